"""`fedlora aggregate`: what stands on its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora import aggregate
from fedlora.adapters.saved_adapter import load_adapter, write_adapter
from fedlora.commands.aggregate import number, verb
from fedlora.errors import InputError
from fedlora.lowrank import to_dense
from fedlora.model.targets import Targets
from support.adapters import random_lowrank


def written(path: Path, seed: int) -> str:
    """A PEFT directory of one module."""
    targets = Targets({"a.q": (6, 5)}, ["q"], False, "tiny")
    write_adapter(path, {"a.q": random_lowrank((6, 5), 2, seed)}, targets)
    return str(path)


def test_the_result_is_written_and_told(tmp_path: Path) -> None:
    paths = [written(tmp_path / str(i), i) for i in range(2)]
    told: list[Any] = []
    output = str(tmp_path / "out")
    assert verb([*paths, "--output", output, "--weights", "3", "1"], told.append) == 0
    (line,) = told
    assert line["adapters"] == [
        {"path": p, "weight": w} for p, w in zip(paths, (0.75, 0.25), strict=True)
    ]
    assert line["layers"]["a.q"]["ranks"] == (2, 2)
    one, other = (to_dense(random_lowrank((6, 5), 2, i)) for i in range(2))
    combined = to_dense(load_adapter(output).deltas["a.q"])
    assert float((combined - 0.75 * one - 0.25 * other).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give PEFT directories and --output DIR"),
        (["a"], "give PEFT directories and --output DIR"),
        (["a", "--output", "out", "--weights"], "--weights: give one for each adapter"),
        (["a", "--output", "out", "--same_base", "maybe"], "--same_base: is given alone"),
        (["a", "--output", "out", "--rank"], "--rank: give a number"),
        (["a", "--output", "out", "--rank", "2.5"], "rank: 2.5 is no whole number"),
        (["a", "--output", "out", "--energy", "much"], "energy: 'much' is no number"),
        (["a", "--output", "out", "--picture", "x.png"], "--picture: draws the overlap"),
        (["a", "--overlap"], "--overlap: give two adapters or more"),
        (["a", "b", "--overlap", "--rank", "3"], "--overlap: combines nothing; leave out --rank"),
        (["a", "b", "--overlap", "--picture", "x.jpg"], "--picture x.jpg: a picture's name ends"),
        (["a", "--output", "out", "--method", "ffa"], "method: ffa needs a start that all clients"),
    ],
)
def test_mistakes(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        verb(arguments)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_a_command_line() -> None:
    assert number("rank", "1e2") == 100.0
    with pytest.raises(InputError, match="rank: None is no number"):
        number("rank", None)


def test_an_overlap_is_told_and_drawn(tmp_path: Path) -> None:
    paths = [written(tmp_path / str(i), i) for i in range(2)]
    told: list[Any] = []
    picture = tmp_path / "overlap.svg"
    assert verb([*paths, "--overlap", "--picture", str(picture)], told.append) == 0
    (line,) = told
    assert [adapter["path"] for adapter in line["adapters"]] == paths
    assert 0 < line["pairs"][0]["shared"][0] < 1
    assert picture.read_text().startswith("<?xml")


def test_a_negative_weight_takes_an_adapter_out(tmp_path: Path) -> None:
    paths = [written(tmp_path / str(i), i) for i in range(2)]
    told: list[Any] = []
    words = ["--output", str(tmp_path / "out"), "--raw_weights", "--weights", "1", "-0.5"]
    assert verb([*paths, *words], told.append) == 0
    assert [adapter["weight"] for adapter in told[0]["adapters"]] == [1.0, -0.5]
    one, other = (to_dense(random_lowrank((6, 5), 2, i)) for i in range(2))
    combined = to_dense(load_adapter(tmp_path / "out").deltas["a.q"])
    assert float((combined - one + 0.5 * other).abs().max()) < 1e-6


def test_a_merge_and_its_options(tmp_path: Path) -> None:
    paths = [written(tmp_path / str(i), i) for i in range(2)]
    told: list[Any] = []
    words = ["--output", str(tmp_path / "out"), "--method", "dare", "--seed", "3"]
    assert verb([*paths, *words, "--density", "0.5"], told.append) == 0
    found = load_adapter(tmp_path / "out").deltas["a.q"]
    wanted = aggregate([load_adapter(p) for p in paths], method="dare", seed=3, density=0.5)
    assert torch.equal(found.A, wanted.deltas["a.q"].A)
