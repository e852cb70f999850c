"""All who listen to a run are told in order, and closed in any case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.runs.observers import observers
from fedlora.runs.progress import read_progress

BEGIN = {"event": "begin", "num_rounds": 2, "ranks": [2], "resumed_from": None}


def state(path: Path) -> dict[str, Any]:
    """What `progress.json` says."""
    progress = read_progress(path)
    assert progress is not None
    return progress


def test_numbers_that_are_not_finite_are_told_as_none(tmp_path: Path) -> None:
    told: list[Any] = []
    with observers(Config(), tmp_path, told.append) as tell:
        tell({"event": "start", "round": 0, "evaluation": {"loss": float("nan"), "n": 1.5}})
    assert told == [{"event": "start", "round": 0, "evaluation": {"loss": None, "n": 1.5}}]


def test_progress_hears_of_an_event_before_the_caller(tmp_path: Path) -> None:
    phases = []

    def report(event: Any) -> None:
        phases.append(event["event"])
        if event["event"] == "begin":
            raise RuntimeError("the caller's own mistake")

    with (
        pytest.raises(RuntimeError, match="own mistake"),
        observers(Config(), tmp_path, report) as tell,
    ):
        tell(BEGIN)
    assert phases == ["begin"]
    assert state(tmp_path)["num_rounds"] == 2


@pytest.mark.parametrize(
    ("error", "says"),
    [(KeyboardInterrupt(), "interrupted"), (ValueError("one\ntwo"), "one")],
)
def test_how_a_run_ended_is_written_down(error: BaseException, says: str, tmp_path: Path) -> None:
    def run() -> None:
        with observers(Config(), tmp_path) as tell:
            tell(BEGIN)
            raise error

    with pytest.raises(type(error)):
        run()
    assert says in str(state(tmp_path))


def test_a_run_that_ended_well_has_no_problem(tmp_path: Path) -> None:
    with observers(Config(), tmp_path) as tell:
        tell(BEGIN)
    assert "interrupted" not in str(state(tmp_path))
