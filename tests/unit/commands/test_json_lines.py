"""JSON for programs: standard output holds objects, one a line, and nothing else."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest

from fedlora.commands.json_lines import only_json


def test_objects_go_out_and_what_is_printed_goes_to_standard_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with only_json() as emit:
        print("from Python")
        os.write(1, b"from elsewhere\n")
        emit({"a": 1})
        emit({"b": math.nan, "c": Path("x")})
    out, err = capfd.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [{"a": 1}, {"b": None, "c": "x"}]
    assert "from Python" in err
    assert "from elsewhere" in err


def test_afterwards_everything_is_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with pytest.raises(RuntimeError, match="broken"), only_json():
        raise RuntimeError("broken")
    assert sys.stdout is before
    print("ordinary")
    os.write(1, b"and this\n")
    assert "and this" in capfd.readouterr().out
