"""`fedlora study`: the grid, the statistics, the runs and the tables."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from fedlora.commands.cli import main
from fedlora.commands.study.execute import execute, threads_and_processes
from fedlora.commands.study.load import load_study
from fedlora.commands.study.plan import shipped
from fedlora.commands.study.statistics import mean_and_sd, paired
from fedlora.commands.study.tables import over_cells, tables
from fedlora.runs.metrics_log import read_metrics

SHORT = ["--num_rounds", "1", "--max_steps", "1", "--max_eval_samples", "8", "--processes", "1"]
SHORT += ["--num_threads", "1"]  # beside other tests


def study(tmp_path: Path, **changes: Any) -> Path:
    """A small study's file."""
    file = {
        "question": "which?",
        "metric": "loss",
        "seeds": [0, 1],
        "sizes": {
            "small": {
                "base": "embedded",
                "keys": {
                    "num_rounds": 2,
                    "max_steps": 1,
                    "max_eval_samples": 8,
                    "num_threads": 1,
                },
            },
            "other": {"base": "embedded", "grid": {"ranks": {"mixed": None}}},
        },
        "parts": {
            "table": {
                "title": "two rules",
                "compare": "method",
                "reference": "flora",
                "grid": {
                    "ranks": {
                        "equal": {"client_ranks": 4},
                        "mixed": {"client_ranks": [8, 8, 8, 8, 8, 4, 4, 4, 4, 4]},
                    },
                    "method": ["flora", "fedit"],
                },
            }
        },
        **changes,
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(file, sort_keys=False))
    return path


# --- statistics ---


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


# --- the grid ---


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


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"parts": {}}, "parts: expected names"),
        ({"partz": {}}, "partz: unknown key; did you mean parts?"),
        ({"parts": {"t": {"grid": {"m": {}}}}}, "m has no values"),
        (
            {"parts": {"t": {"grid": {"m": {"a": {"methud": "x"}}}}}},
            "t, m a: methud: unknown configuration key; did you mean method?",
        ),
        ({"parts": {"t": {"grid": {"m": {"a": {"seed": 3}}}}}}, "seed: give seeds"),
        ({"parts": {"t": {"compare": "q", "grid": {"m": {"a": {}}}}}}, "'q' is no axis"),
        ({"parts": {"t": {"grid": {"m": {"a": {"trainer": "x"}}}}}}, "none of adalora"),
        ({"parts": {"t": {"grid": {"m": {"a": {"alone": "x"}}}}}}, "expected a client's number"),
        ({"parts": {"t": {"grid": {"method": {"exact": "exact"}}}}}, "method: exact: expected"),
        ({"parts": {"t": {"grid": {}}}}, "grid: has no axes"),
        ({"parts": {"t": {"keys": ["a"], "grid": {"m": {"a": {}}}}}}, "keys: expected names"),
        ({"parts": {"t": {"reference": "b", "grid": {"m": {"a": {}}}}}}, "'b' is no value of m"),
        ({"metric": "accuracyy"}, "metric: 'accuracyy' is not measured; there are loss"),
        ({"seeds": 3}, "seeds: 3: expected a list"),
        ({"seeds": ["a"]}, "expected a list of whole numbers"),
    ],
)
def test_a_mistake_in_the_file_is_told_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study(tmp_path, **changes)
    assert main(["study", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give a file or one of"),
        (["ruls"], "did you mean rules?"),
        (["rules", "--size", "huge"], "has embedded, gpu"),
        (["rules", "--part", "x"], "--part x"),
        (["rules", "--where", "method"], "expected AXIS=VALUE"),
        (["rules", "--where", "method=nope"], "there are exact"),
        (["rules", "--where", "colour=red"], "no such axis"),
        (["rules", "--seeds", "one"], "expected a whole number"),
        (["rules", "--processes", "0"], "expected a whole number from 1"),
        (["rules", "--method_x", "1"], "unknown configuration key"),
    ],
)
def test_a_mistake_on_the_command_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("size", ["embedded", "gpu"])
@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_study_lays_out_at_both_sizes(
    name: str, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", name, "--size", size, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert f"{name} ({size})" in shown
    assert len(load_study(name, size=size).runs) > 10


# --- the runs ---


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study, run."""
    here = tmp_path_factory.mktemp("study")
    path = study(here)
    arguments = ["study", str(path), "--output_dir", str(here / "out"), "--processes", "1"]
    assert main(arguments) == 0
    return here


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


def test_what_is_complete_is_not_run_again(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = made / "out" / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")}
    monkeypatch.setattr(
        "fedlora.commands.study.execute._new_worker", lambda *_: pytest.fail("ran again")
    )
    path = str(made / "mine.yaml")
    assert main(["study", path, "--output_dir", str(made / "out")]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")}
    assert "two rules" in capsys.readouterr().out


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


def test_adalora_counts_tokens_and_weighs_losses_as_our_own_training_does(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    """Rows of 4 to 13 letters: a step's loss is a mean over tokens, however it is accumulated."""
    import fedlora
    from fedlora.client.trainer import train
    from fedlora.commands.study.adalora import train_adalora

    tokens, first = {}, {}
    keys = {**small_run, "method": "flora", "num_rounds": 1, "max_steps": 7}
    for name, function, batch, accumulate in (
        ("ours", train, 6, 1),
        ("whole", train_adalora, 6, 1),
        ("parts", train_adalora, 2, 3),
    ):
        own = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        steps: list[Any] = []
        config = fedlora.Config(**{**keys, **own, "output_dir": str(tmp_path / name)})
        result = fedlora.run(config, train_function=function, report=steps.append)
        line = next(x for x in result.metrics if x["event"] == "round")
        tokens[name] = [x["metrics"]["tokens"] for x in line["clients"]]
        first[name] = [x["loss"] for x in steps if x["event"] == "step" and x["step"] == 1]
        told = [0] * 4
        for x in steps:
            if x["event"] == "step":
                told[x["client"]] += x["tokens"]
        assert told == tokens[name]
    assert tokens["whole"] == tokens["parts"] == tokens["ours"]
    penalties = [a - b for a, b in zip(first["whole"], first["ours"], strict=True)]
    assert min(penalties) > 0  # PEFT's, of random factors
    assert first["parts"] == pytest.approx(first["whole"], rel=1e-5)


def test_a_client_alone_and_adalora_are_runs_too(tmp_path: Path) -> None:
    grid = {"who": {"together": {}, "alone": {"alone": 3}, "ada": {"trainer": "adalora"}}}
    part = {"keys": {"method": "flora", "client_ranks": 4}, "grid": grid}
    path = study(tmp_path, seeds=[0], parts={"t": part})
    out = tmp_path / "out"
    steps = [*SHORT[:3], "4", *SHORT[4:]]
    assert main(["study", str(path), "--output_dir", str(out), *steps]) == 0
    keys = {**overrides(), "max_steps": 4}
    runs = {x.labels["who"]: x for x in load_study(str(path), overrides=keys).runs}
    lines = {k: read_metrics(out / "runs" / run.directory) for k, run in runs.items()}
    clients = {k: next(x for x in v if x["event"] == "round")["clients"] for k, v in lines.items()}
    assert len(clients["together"]) == 10
    assert len(clients["alone"]) == 1
    assert clients["alone"][0]["num_examples"] == clients["together"][3]["num_examples"]
    assert all(x["metrics"]["mean_rank"] <= 4 for x in clients["ada"])
    assert (out / "runs" / runs["alone"].directory / "final" / "adapter_config.json").is_file()


def overrides() -> dict[str, Any]:
    return {"num_rounds": 1, "max_steps": 1, "max_eval_samples": 8, "num_threads": 1}


def test_a_killed_study_goes_on_with_the_run_it_was_in(tmp_path: Path) -> None:
    grid = {"method": ["flora"]}
    path = study(tmp_path, seeds=[0], parts={"t": {"grid": grid}})
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "fedlora", "study", str(path), "--output_dir", str(out)]
    arguments += ["--processes", "1", "--num_threads", "1"]
    arguments += ["--num_rounds", "4", "--max_steps", "2"]
    run = load_study(
        str(path), overrides={"num_rounds": 4, "max_steps": 2, "num_threads": 1}
    ).runs[0]  # fmt: skip
    metrics = out / "runs" / run.directory / "metrics.jsonl"
    process = subprocess.Popen(arguments, env={**os.environ}, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if metrics.is_file() and '"event": "round"' in metrics.read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert not (metrics.parent / "final").exists()
    assert subprocess.run(arguments, env={**os.environ}, check=False).returncode == 0
    events = [json.loads(line)["event"] for line in metrics.read_text().splitlines()]
    assert "resume" in events
    assert events[-1] == "end"
    assert len([x for x in read_metrics(metrics.parent) if x["event"] == "round"]) == 4


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


def test_no_process_outlives_a_study_that_is_killed(tmp_path: Path) -> None:
    path = study(tmp_path, seeds=[0], parts={"t": {"grid": {"method": ["flora"]}}})
    arguments = [sys.executable, "-m", "fedlora", "study", str(path), "--processes", "1"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--num_threads", "1"]
    arguments += ["--num_rounds", "500", "--max_steps", "1"]
    process = subprocess.Popen(arguments, env={**os.environ}, stdout=subprocess.PIPE)
    until = time.monotonic() + 120
    workers: list[int] = []
    while not workers and time.monotonic() < until:
        time.sleep(0.05)
        if list((tmp_path / "out" / "runs").glob("*/metrics.jsonl")):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            workers = [int(pid) for pid in children.split()]
    assert workers
    process.kill()
    process.communicate()
    while any(alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    try:
        return "fedlora.commands.study.worker" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
