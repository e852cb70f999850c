"""What tells that adapters are for one base: fingerprints of runs, or names and shapes alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora import aggregate
from fedlora.adapters.base_fingerprint import base_fingerprint, compare_bases
from support.merging import made


def run(path: Path, fingerprint: str) -> Path:
    """A run's directory as far as fingerprints go."""
    for number in (1, 2):
        state = path / f"round-{number}" / "state"
        state.mkdir(parents=True)
        (state / "state.json").write_text(json.dumps({"extra": {"base": fingerprint}}))
    (path / "config.yaml").write_text("")
    (path / "final" / "client-0").mkdir(parents=True)
    return path


def test_every_adapter_of_a_run_has_it(tmp_path: Path) -> None:
    out = run(tmp_path / "out", "abc")
    for name in ("round-1", "final", "final/client-0"):
        assert base_fingerprint(out / name) == "abc"
    assert base_fingerprint(tmp_path / "elsewhere") == ""
    (out / "round-2" / "state" / "state.json").write_text("{")
    assert base_fingerprint(out / "final") == "abc"


def test_it_is_said_what_was_compared(tmp_path: Path) -> None:
    places = [run(tmp_path / name, name[0]) / "final" for name in ("a1", "a2", "b1")]
    one, same, other = (
        replace(made({"q": ((5, 4), 1)}, i), source=str(place)) for i, place in enumerate(places)
    )
    plain = made({"q": ((5, 4), 1)}, 3)
    assert compare_bases([one, same], False) == (
        "bases compared by fingerprints of their weights",
        [],
    )
    says, notes = compare_bases([one, plain], False)
    assert says.endswith("no fingerprint beside an adapter")
    assert notes == []
    assert compare_bases([plain, plain], False)[0].endswith("no adapter has a fingerprint")
    says, (note,) = compare_bases([one, same, other], False)
    assert says.endswith("which differ")
    assert note.startswith(f"{places[0]} and {places[2]}: ")
    assert compare_bases([one, other], True)[1] == []
    with pytest.warns(UserWarning, match="fingerprints of their bases' weights differ"):
        found = aggregate([one, other])
    assert found.bases == says
    assert any("--same_base" in text for text in found.notes)
