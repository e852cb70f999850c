"""A study's file, and the runs that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.study.load import load_study
from fedlora.errors import InputError
from support.study import study


def test_every_combination_with_every_seed_whole_seeds_first(tmp_path: Path) -> None:
    loaded = load_study(str(study(tmp_path)))
    assert [run.seed for run in loaded.runs] == [0] * 3 + [1] * 3
    assert [tuple(run.labels.values()) for run in loaded.runs[:3]] == [
        ("equal", "flora"),
        ("equal", "fedit"),
        ("mixed", "flora"),
    ]
    assert loaded.size == "small"
    assert all(run.keys["num_rounds"] == 2 for run in loaded.runs)
    (part,) = loaded.parts
    assert part.left_out == ("fedit needs one rank for all clients",)
    assert (part.compare, part.reference, part.metric) == ("method", "flora", "loss")


def test_a_size_may_leave_values_out(tmp_path: Path) -> None:
    loaded = load_study(str(study(tmp_path)), size="other")
    assert loaded.parts[0].axes["ranks"] == ("equal",)


def test_fewer_seeds_and_values_and_other_keys(tmp_path: Path) -> None:
    path = str(study(tmp_path))
    loaded = load_study(path, seeds=[7], where={"method": ["fedit"]}, overrides={"num_rounds": "9"})
    assert [run.seed for run in loaded.runs] == [7]
    assert loaded.runs[0].keys["num_rounds"] == 9  # as a number, whoever wrote it
    assert loaded.parts[0].reference == "fedit"  # the first that is left


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"size": "large"}, "--size large: mine.yaml has small, other"),
        ({"only": ["tabel"]}, "--part tabel: mine.yaml has table"),
        ({"where": {"rank": ["equal"]}}, "--where rank: no such axis; there are ranks, method"),
        ({"where": {"method": ["exact"]}}, "--where method=exact: there are flora, fedit"),
        ({"overrides": {"seed": 3}}, r"seed: give seeds: \[0, 1, 2\]"),
        ({"overrides": {"num_rounds": 0}}, "ranks equal, method flora: num_rounds"),
        ({"overrides": {"alone": -1}}, "alone: -1: expected a client's number, from 0"),
        ({"overrides": {"trainer": "mine"}}, "trainer: 'mine' is none of adalora"),
    ],
)
def test_what_does_not_fit(how: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        load_study(str(study(tmp_path)), **how)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric": "bleu"}, "metric: 'bleu' is not measured"),
        ({"seeds": [-1]}, r"seeds: \[-1\]: expected a list of whole numbers from 0"),
        ({"parts": {}}, "parts: expected names with their values"),
        ({"part": {}}, "part: unknown key; did you mean parts"),
        ({"parts": {"t": {"grid": {}}}}, "t: grid: has no axes"),
        ({"parts": {"t": {"grid": {"method": []}}}}, "grid: method has no values"),
        (
            {"parts": {"t": {"compare": "rule", "grid": {"method": ["exact"]}}}},
            "compare: 'rule' is no axis; there are method",
        ),
        (
            {"parts": {"t": {"choose": "method", "grid": {"method": ["exact"]}}}},
            "choose: 'method' is no axis beside method; there are none",
        ),
        (
            {
                "parts": {
                    "t": {
                        "choose": "learning_rate",
                        "grid": {"learning_rate": [1e-3, 2e-3], "method": ["exact"]},
                    }
                }
            },
            "learning_rate is chosen on rows that clients hold out; give client_eval_fraction",
        ),
    ],
)
def test_files_that_are_no_study(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        load_study(str(study(tmp_path, **changes)))


def test_a_study_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"ruels: no such study; .* did you mean rules"):
        load_study("ruels")


def test_equal_settings_are_one_run_whoever_asks(tmp_path: Path) -> None:
    twice = {
        name: {"grid": {axis: {"a": {"method": "flora"}, "b": {"method": "ffa"}}}}
        for name, axis in (("one", "method"), ("two", "rule"))
    }
    found = load_study(str(study(tmp_path, parts=twice)), overrides={"num_rounds": "2"})
    assert len(found.runs) == 8
    assert len({run.directory for run in found.runs}) == 4
    typed = load_study(str(study(tmp_path, parts=twice)), overrides={"num_rounds": 2})
    assert [x.directory for x in found.runs] == [x.directory for x in typed.runs]


def test_an_axis_may_be_chosen_on_held_out_rows(tmp_path: Path) -> None:
    grid = {"learning_rate": [1e-3, 2e-3], "ranks": {"equal": {"client_ranks": 4}},
            "method": ["exact", "flora"]}  # fmt: skip
    keys = {"client_eval_fraction": 0.1}
    parts = {"t": {"choose": "learning_rate", "grid": grid, "keys": keys}}
    (part,) = load_study(str(study(tmp_path, parts=parts))).parts
    assert (part.choose, part.of_cell) == ("learning_rate", ["ranks"])
