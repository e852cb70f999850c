"""Runs that differ by their seed alone are one series."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fedlora.commands.report.series import curve, differing, group, lone, written
from fedlora.commands.run_files import Run


def run(name: str, begin: Any = None, text: str = "", **config: Any) -> Run:
    """A run with this configuration."""
    keys = {"method": "exact", "seed": 0, **config} if config.pop("known", True) else {}
    return Run(Path(name), name, keys, text, begin or {}, {}, (), (), {}, ())


def test_mean_and_deviation_by_round() -> None:
    line = curve([{1: 1.0, 2: 5.0}, {1: 3.0}])
    assert line.rounds == (1, 2)
    assert line.mean == (2.0, 5.0)
    assert line.sd == (math.sqrt(2.0), None)
    assert line.count == (2, 1)
    assert curve([]).rounds == ()


def test_keys_that_differ_the_method_first() -> None:
    configs = [
        {"learning_rate": 1, "method": "exact", "seed": 1, "output_dir": "a"},
        {"learning_rate": 2, "method": "flora", "seed": 2, "output_dir": "b"},
    ]
    assert differing(configs) == ["method", "learning_rate"]
    # A rule's option differs only where two runs of that rule differ in it.
    assert differing([{"method": "exact", "start_fraction": 1}, {"method": "flora"}]) == ["method"]


def test_seeds_are_one_series_and_labels_say_what_differs() -> None:
    series = group(
        [run("a"), run("b", seed=1), run("c", learning_rate=0.1), run("d", learning_rate=0.2)]
    )
    assert [one.runs for one in series] == [(0, 1), (2,), (3,)]
    assert [one.label for one in series][1:] == ["learning_rate 0.1", "learning_rate 0.2"]


def test_one_seed_twice_is_no_repetition() -> None:
    series = group([run("a"), run("b")])
    assert [one.runs for one in series] == [(0,), (1,)]
    assert len({one.label for one in series}) == 2


def test_a_run_without_a_configuration_is_like_no_other() -> None:
    series = group([run("a", known=False), run("b", known=False)])
    assert [(one.label, one.runs) for one in series] == [("a", (0,)), ("b", (1,))]


def test_a_client_alone_is_known_by_its_number() -> None:
    alone = run("a", begin={"alone": 3}, learning_rate=0.1, client_ranks=[4])
    assert lone(alone) == 3
    assert written(alone)["alone"] == 3
    assert "client_ranks" not in written(alone)
    assert group([alone, run("b")])[0].label.startswith("client 3 alone")
