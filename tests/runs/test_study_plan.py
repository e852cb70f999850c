"""A study's grid, its seeds and their statistics, before anything is run."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from fedlora.commands.study.execute import threads_and_processes
from fedlora.commands.study.load import load_study
from fedlora.commands.study.statistics import mean_and_sd, paired
from support.study import study


@given(
    st.lists(
        st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=8, unique=True
    )
)
def test_the_interval_is_that_of_scipys_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    a, b = dict(enumerate(x for x, _ in pairs)), dict(enumerate(y for _, y in pairs))
    found = paired(a, b)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    differences = np.array([x - y for x, y in pairs])
    if np.ptp(differences) < 1e-6:
        return
    oracle = ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    assert np.allclose([found.low, found.high], [oracle.low, oracle.high], rtol=1e-6, atol=1e-9)


def test_only_seeds_that_both_have_are_paired() -> None:
    found = paired({0: 1.0, 1: 2.0, 5: 100.0}, {0: 0.5, 1: 1.0, 7: -100.0})
    assert found is not None
    assert (found.seeds, found.mean) == (2, 0.75)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_a_win_is_an_interval_without_zero() -> None:
    clear = paired({0: 0.9, 1: 0.91, 2: 0.92}, {0: 0.5, 1: 0.52, 2: 0.51})
    unclear = paired({0: 0.9, 1: 0.1, 2: 0.5}, {0: 0.5, 1: 0.4, 2: 0.4})
    single = paired({0: 0.9}, {0: 0.1})
    assert clear is not None
    assert unclear is not None
    assert single is not None
    assert (clear.verdict(), clear.verdict(greater_is_better=False)) == ("wins", "loses")
    assert unclear.verdict() == "ties"
    assert (single.low, single.verdict()) == (None, "-")


def test_the_spread_is_the_sample_standard_deviation() -> None:
    mean, sd = mean_and_sd([1.0, 2.0, 4.0])
    assert math.isclose(mean, 7 / 3)
    assert sd is not None
    assert math.isclose(sd, float(np.std([1.0, 2.0, 4.0], ddof=1)))
    assert mean_and_sd([3.0]) == (3.0, None)


def test_every_combination_is_a_run_and_impossible_ones_are_named(tmp_path: Path) -> None:
    found = load_study(str(study(tmp_path)))
    assert found.size == "small"
    seen = [(*run.labels.values(), run.seed) for run in found.runs]
    per_seed = [("equal", "flora"), ("equal", "fedit"), ("mixed", "flora")]
    assert seen == [(*x, seed) for seed in (0, 1) for x in per_seed]
    assert found.parts[0].left_out == ("fedit needs one rank for all clients",)
    assert all(run.keys["num_rounds"] == 2 for run in found.runs)


def test_a_size_leaves_a_value_out(tmp_path: Path) -> None:
    found = load_study(str(study(tmp_path)), size="other")
    assert found.parts[0].axes["ranks"] == ("equal",)


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


def test_threads_and_processes_fill_the_cores_and_no_more() -> None:
    cores = len(os.sched_getaffinity(0))
    for asked in (None, 1, 2, cores):
        threads, processes = threads_and_processes(asked, gpu=False)
        assert processes == (asked or cores)
        assert threads == max(1, cores // processes)
    assert threads_and_processes(None, gpu=True) == (cores, 1)
