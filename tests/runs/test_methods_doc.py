"""docs/methods.md says what the rules declare, and its example of a new rule works as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora import methods
from support.methods_doc import PAGE, from_file


def test_the_new_rule_of_the_page_runs(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file and the line of the page, and nothing else."""
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)
    assert code is not None
    lines = [line.removeprefix("   ") for line in code.group(1).splitlines()]
    (tmp_path / "cautious.py").write_text("\n".join(lines))
    cautious = from_file("cautious", tmp_path / "cautious.py")
    monkeypatch.setitem(methods.METHODS, "cautious", cautious.RULE)
    small_run |= {"client_ranks": [4] * 4, "num_rounds": 1, "save_total_limit": None}
    runs = {}
    for share in (0.0, 1.0):
        out = str(tmp_path / f"share-{share}")
        config = fedlora.Config(
            **{**small_run, "method": "cautious", "share": share, "output_dir": out}
        )
        runs[share] = fedlora.run(config)
    plain = fedlora.run(fedlora.Config(**{**small_run, "method": "fedit"}))
    assert runs[1.0].evaluations == plain.evaluations
    assert runs[0.0].evaluations[1] == runs[0.0].evaluations[0]
    assert runs[0.0].evaluations[1] != runs[1.0].evaluations[1]
