"""`fedlora watch --json` waits for a run that has not begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.commands.cli import main
from support.json import (
    Told,
    here,  # noqa: F401
    told,  # noqa: F401
)
from support.script import (
    _offline,  # noqa: F401
    _signals_as_they_were,  # noqa: F401
)


def test_watch_waits_and_then_tells(
    told: Told, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        if not (here / "out").exists():
            (here / "hidden").rename(here / "out")

    main(["run", "my.yaml", "--output_dir", "hidden"])
    monkeypatch.setattr("fedlora.commands.watch.verb.time.sleep", sleep)
    first, second = told("watch out")
    assert first == {"event": "waiting", "path": "out"}
    assert second["ended"]
