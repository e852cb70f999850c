"""`fedlora study`: the grid, the statistics, the runs and the tables."""

from __future__ import annotations

import csv
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from fedlora.commands.cli import main
from fedlora.commands.study.execute import execute, threads_and_processes
from fedlora.commands.study.load import load_study
from fedlora.commands.study.statistics import mean_and_sd, paired
from fedlora.commands.study.tables import over_cells, tables
from fedlora.runs.metrics_log import read_metrics
from support.study import (
    SHORT,
    made,  # noqa: F401
    overrides,
    study,
)

SHORT += ["--num_threads", "1"]  # beside other tests


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


def test_the_tables_hold_what_the_runs_measured(made: Path) -> None:
    found = load_study(str(made / "mine.yaml"))
    (table,) = tables(found, made / "out" / "runs")
    assert not table.missing
    of = {(row.cell, row.label): row for row in table.rows}
    for run in found.runs:
        lines = read_metrics(made / "out" / "runs" / run.directory)
        last = [line for line in lines if line.get("evaluation")][-1]
        row = of[(run.labels["ranks"],), run.labels["method"]]
        outcome = row.outcomes[run.seed]
        assert outcome.value == last["evaluation"]["loss"]
        rounds = [line for line in lines if line["event"] == "round"]
        assert outcome.up == sum(line["bytes_up"] for line in rounds)
        parameters = lines[0]["parameters"]
        assert outcome.traffic is not None
        assert math.isclose(
            outcome.traffic, (outcome.up + outcome.down) / (2 * 4 * parameters * 10 * 2)
        )
        assert outcome.with_base is not None
        assert math.isclose(outcome.with_base - outcome.traffic, 1 / 4)  # once, of 2 rounds x 2
    flora, fedit = of[("equal",), "flora"], of[("equal",), "fedit"]
    assert flora.difference is None
    assert fedit.difference is not None
    assert math.isclose(
        fedit.difference.mean, (sum(fedit.values) - sum(flora.values)) / 2, abs_tol=1e-12
    )
    assert over_cells(table, "fedit") == (fedit.difference, 1)  # the mixed cell has no fedit


def test_the_files_say_the_same(made: Path) -> None:
    page = (made / "out" / "table.md").read_text()
    with (made / "out" / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    with (made / "out" / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert len(runs) == 6
    equal = [float(x["value"]) for x in runs if (x["ranks"], x["method"]) == ("equal", "fedit")]
    (line,) = [x for x in summary if (x["cell"], x["label"]) == ("equal", "fedit")]
    assert math.isclose(float(line["mean"]), sum(equal) / 2)
    assert f"{sum(equal) / 2:.4f} ±" in page
    assert "fedit needs one rank for all clients" in page
    assert line["verdict"] in ("wins", "ties", "loses")


def test_runs_of_other_settings_are_not_mixed_in(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_study(str(made / "mine.yaml")).runs[0]
    file = made / "out" / "runs" / run.directory / "config.yaml"
    text = file.read_text()
    try:
        file.write_text(text.replace("learning_rate: 0.003", "learning_rate: 0.004"))
        arguments = ["study", str(made / "mine.yaml"), "--output_dir", str(made / "out")]
        assert main(arguments) == 2
    finally:
        file.write_text(text)
    complaint = capsys.readouterr().err
    assert "made with other settings" in complaint
    assert "learning_rate: 0.004 when it began, 0.003 now" in complaint


def test_a_run_that_fails_is_named_and_the_others_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"model": {"good": {}, "bad": {"model_name_or_path": str(tmp_path / "nothing")}}}
    path = study(tmp_path, seeds=[0], parts={"t": {"grid": grid}})
    arguments = ["study", str(path), "--output_dir", str(tmp_path / "out"), *SHORT]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    assert "nothing" in shown
    page = (tmp_path / "out" / "table.md").read_text()
    assert "`good`" in page
    assert "bad, seed 0: not complete" in page


def test_a_run_whose_process_dies_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = study(tmp_path, seeds=[0], parts={"t": {"grid": {"method": ["flora", "ffa"]}}})
    found = load_study(str(path), overrides=overrides())
    heard: list[tuple[str, str]] = []

    def on_change(what: str, run: Any, message: Any) -> None:
        heard.append((what, run.keys["method"]))
        if what == "start" and run.keys["method"] == "flora":
            for child in children():
                os.kill(child, signal.SIGKILL)

    def children() -> list[int]:
        listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return [
            int(pid)
            for pid in listed
            if "fedlora.commands.study.worker" in Path(f"/proc/{pid}/cmdline").read_text()
        ]

    failed = execute(found.runs, tmp_path / "runs", processes=1, gpu=False, on_change=on_change)
    (why,) = failed.values()
    assert why.startswith("its process was killed by signal 9; see ")
    assert ("done", "ffa") in heard
    assert ("failed", "flora") in heard


def test_threads_and_processes_fill_the_cores_and_no_more() -> None:
    cores = len(os.sched_getaffinity(0))
    for asked in (None, 1, 2, cores):
        threads, processes = threads_and_processes(asked, gpu=False)
        assert processes == (asked or cores)
        assert threads == max(1, cores // processes)
    assert threads_and_processes(None, gpu=True) == (cores, 1)


@pytest.mark.slow  # that each file's grid can be laid out, and that a study runs, is tested above
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("flora-paper", ["--part", "table", "scaling_factor", "--where", "ranks=equal"]),
        ("many-short-rounds", []),
        ("rules", ["--where", "division=iid", "ranks=equal", "schedule=short", "--part", "table"]),
        ("heterogeneity", ["--part", "participation", "--where", "method=exact,zero_pad"]),
    ],
)
def test_a_shipped_study_in_short_form(name: str, where: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["study", name, *where, "--seeds", "0", "--output_dir", str(out), *SHORT]
    assert main([*arguments, "--eval_rounds", "0"]) == 0
    page = (out / "table.md").read_text()
    assert "missing" not in page
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row["value"] and not row["missing"] for row in rows)
