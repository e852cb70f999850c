"""`--json`: every verb for programs. Lines of JSON on standard output, and nothing else there."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedlora.commands import VERBS
from fedlora.commands.cli import main
from fedlora.commands.json_lines import only_json
from fedlora.config.config import Config
from fedlora.data.raw_data import load_rows
from fedlora.methods import METHODS
from fedlora.runs.metrics_log import read_metrics
from support.json import (
    Told,
    here,  # noqa: F401
    no_constant,
    told,  # noqa: F401
)
from support.script import (
    _offline,  # noqa: F401
    _signals_as_they_were,  # noqa: F401
)


def test_config(told: Told) -> None:
    (found,) = told("config my.yaml --lora_r 8")
    values = yaml.safe_load(Path("my.yaml").read_text())
    assert found == Config(**{**values, "lora_r": 8}).flat()


def test_plan(told: Told) -> None:
    (found,) = told("plan my.yaml --no_calibration --client_memory 6GB")
    config = Config(**yaml.safe_load(Path("my.yaml").read_text()))
    assert [client["rank"] for client in found["clients"]] == config.client_ranks
    for client in found["clients"]:
        parts = {name: x for name, x in client["memory"].items() if name != "total"}
        assert client["memory"]["total"] == sum(parts.values()) > 0
        assert client["fits"]
    assert set(found["methods"]) | set(found["excluded"]) == set(METHODS)
    assert found["server"]["disk"] > 0
    assert found["time"]["tokens_per_second"] is None


def test_partition(told: Told) -> None:
    (found,) = told("partition my.yaml --by kind --output who.svg")
    config = Config(**yaml.safe_load(Path("my.yaml").read_text()))
    raw = load_rows(config)
    assert found["column"] == "kind"
    for client, rows in zip(found["clients"], raw.clients, strict=True):
        assert client["rows"] == len(rows)
        counts = Counter(row["kind"] for row in rows)
        assert {k: n for k, n in client["counts"].items() if n} == counts
    assert [c["rank"] for c in found["clients"]] == config.client_ranks
    assert found["eval"]["rows"] == 10
    assert Path(found["picture"]).is_file()


def test_data(told: Told, site_files: Path) -> None:
    (found,) = told("data my.yaml --show 5")
    rows = [
        json.loads(x)
        for k in range(4)
        for x in (site_files / f"site_{k}.jsonl").read_text().splitlines()
    ]
    assert (found["rows"], found["clients"], found["eval_rows"]) == (60, 4, 10)
    lengths = sorted(len(row["prompt"]) + len(row["completion"]) + 1 for row in rows)  # EOS
    assert found["tokens"] == sum(lengths)
    assert found["learnt_tokens"] == sum(len(row["completion"]) + 1 for row in rows)
    assert found["length"]["least"] == lengths[0]
    assert found["length"]["most"] == lengths[-1]
    assert len(found["samples"]) == 5
    known = {(row["prompt"], row["completion"] + "</s>") for row in rows}
    for sample in found["samples"]:
        parts = [
            "".join(x["text"] for x in sample["pieces"] if x["learnt"] is learnt)
            for learnt in (False, True)
        ]
        assert tuple(parts) in known


def test_a_plan_and_its_run(told: Told, here: Path) -> None:
    (plan,) = told("run my.yaml --dry_run --method fedit --client_ranks 4")
    assert not (here / "out").exists()
    *events, end = told("run my.yaml --method fedit --client_ranks 4")
    assert [e["event"] for e in events] == ["begin", "start", "round", "round"]
    assert end["event"] == "end"
    assert [*events[1:], end] == read_metrics(here / "out")[1:]
    sent = {c["client"]: c["bytes_up"] for c in events[2]["clients"]}
    assert {c["client"]: c["bytes_up"] for c in plan["clients"]} == sent
    begun = read_metrics(here / "out")[0]
    for key in ("architecture", "parameters", "modules", "eval_rows", "dense_parameters"):
        assert plan[key] == begun[key]
    for mine, run in zip(plan["clients"], begun["clients"], strict=True):
        assert all(mine[key] == run[key] for key in ("rank", "rows", "tokens"))
        assert mine["steps"] == 1


def test_settings_of_single_clients_in_a_plan(told: Told) -> None:
    own = yaml.safe_load(Path("my.yaml").read_text())
    own |= {"client_overrides": {1: {"learning_rate": 0.5}}, "client_ranks": None}
    Path("own.yaml").write_text(yaml.safe_dump(own))
    (plan,) = told("run own.yaml --dry_run")
    assert [c["settings"].get("learning_rate") for c in plan["clients"]] == [None, 0.5, None, None]


def test_what_reads_a_run(told: Told, here: Path) -> None:
    """watch, report, eval, generate and aggregate on one run."""
    told("run my.yaml --client_eval_fraction 0.2 --save_client_models true")
    lines = read_metrics(here / "out")
    (look,) = told("watch out")
    assert (look["ended"], look["alive"], look["round"], look["num_rounds"]) == (True, False, 2, 2)
    rounds = [line for line in lines if line["event"] == "round"]
    assert look["bytes_up"] == sum(line["bytes_up"] for line in rounds)
    assert look["evaluation"] == rounds[-1]["evaluation"]
    assert [c["rank"] for c in look["clients"]] == [8, 4, 2, 2]
    assert told("watch out --once")[0]["round"] == 2
    (status,) = told("status out")
    assert (status["state"], status["round"], status["result"]) == ("ended", 2, "out/final")
    assert [c["counted"] for c in status["clients"]] == [2, 2, 2, 2]
    assert [c["bytes_up"] for c in status["clients"]] == [
        sum(line["clients"][k]["bytes_up"] for line in rounds) for k in range(4)
    ]
    assert status["best_round"] == lines[-1]["best"]
    # an unfinished run: it says how to go on
    (here / "out" / "final").rename(here / "final")
    progress = json.loads((here / "out" / "progress.json").read_text())
    (here / "out" / "progress.json").write_text(json.dumps({**progress, "phase": "stopped"}))
    (look,) = told("watch out --once")
    assert (look["ended"], look["alive"]) == (False, False)
    (status,) = told("status out")
    assert (status["state"], status["result"]) == ("stopped", "out/round-2")
    assert "fedlora run --resume out" in look["status"]
    (report,) = told("report out --output page.html --format html,png")
    assert all(Path(x).is_file() for x in report["written"])
    assert len(report["written"]) > 1
    assert [run["path"] for run in report["runs"]] == ["out"]
    assert report["runs"][0]["problems"]  # it is unfinished
    (here / "final").rename(here / "out" / "final")

    *found, end = told("eval out")
    logged = [x for x in read_metrics(here / "out") if x["event"] == "eval"]
    assert found == logged
    assert {x["model"] for x in found} >= {"base", "global"}
    assert end == {"event": "end", "results": len(found), "output_dir": "out/eval"}

    answers = told("generate out --prompt 'stone>' 'oak>' --max_new_tokens 3 --output kept.jsonl")
    kept = [json.loads(line) for line in Path("kept.jsonl").read_text().splitlines()]
    assert answers == [{"event": "answer", **x} for x in kept]
    assert [x["prompt"] for x in answers] == ["stone>", "oak>"]
    assert set(answers[0]["answers"]) == {"base", "global"}

    (merged,) = told("aggregate out/final out/round-1 --weights 3 1 --output both")
    weights = [(x["path"], x["weight"]) for x in merged["adapters"]]
    assert weights == [("out/final", 0.75), ("out/round-1", 0.25)]
    config = json.loads((here / "both" / "adapter_config.json").read_text())
    for name, layer in merged["layers"].items():
        assert layer["rank"] == config["rank_pattern"].get(name, config["r"])
        assert layer["error"] < 1e-5


def test_study(told: Told, here: Path, small_run: dict[str, Any]) -> None:
    keys = {k: v for k, v in small_run.items() if k not in ("output_dir", "client_ranks")}
    study = {
        "sizes": {"tiny": {"seeds": [0, 1], "keys": {**keys, "max_steps": 1, "num_rounds": 1}}},
        "parts": {
            "methods": {
                "title": "two rules",
                "grid": {"method": ["exact", "flora"]},
                "compare": "method",
                "reference": "flora",
            }
        },
    }
    (here / "grid.yaml").write_text(yaml.safe_dump(study))
    (plan,) = told("study grid.yaml --dry_run")
    assert len(plan["runs"]) == 4
    assert {x["labels"]["method"] for x in plan["runs"]} == {"exact", "flora"}
    *events, table, end = told("study grid.yaml --output_dir s --processes 1")
    done = [e["run"] for e in events if e["event"] == "done"]
    assert sorted(done) == sorted(x["run"] for x in plan["runs"])
    assert (end["event"], end["failed"]) == ("end", {})
    assert table["reference"] == "flora"
    rows = {row["method"]: row for row in table["rows"]}
    for method, row in rows.items():
        mine = [x for x in plan["runs"] if x["labels"]["method"] == method]
        values = {
            str(x["seed"]): read_metrics(here / "s" / "runs" / x["run"])[-2]["evaluation"]["loss"]
            for x in mine
        }
        assert row["values"] == values
        assert row["mean"] == pytest.approx(sum(values.values()) / 2)
    assert rows["exact"]["difference"]["low"] <= rows["exact"]["difference"]["mean"]


def test_demo(told: Told, here: Path) -> None:
    short = "--num_rounds 1 --max_steps 1 --max_train_samples 16 --max_eval_samples 12"
    short += " --num_clients 2 --client_ranks 8 4 --num_threads 1 --processes 1"
    (last,) = told(f"demo {short} --seeds 4")
    assert last["event"] == "demo"
    assert (last["seeds"], last["rounds"]) == ([4], [0, 1])
    for method in ("exact", "flora"):
        lines = read_metrics(here / last["output_dir"] / f"{method}-seed-4")
        rounds = [e["evaluation"]["exact_match"] for e in lines if e.get("evaluation")]
        assert last["by_round"][method] == {"4": rounds}
        (line,) = [e for e in lines if e["event"] == "round"]
        assert last["traffic"][method] == {k: line[k] for k in ("bytes_up", "bytes_down")}
    assert all(0 <= value <= 1 for value in last["alone"].values())
    assert last["verdicts"]


def test_completion_and_version(told: Told, capfd: pytest.CaptureFixture[str]) -> None:
    (found,) = told("completion fish")
    assert main(["completion", "fish"]) == 0
    assert found == {"event": "completion", "shell": "fish", "script": capfd.readouterr().out}
    assert list(told("--version")[0]) == ["fedlora"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run --lora_rnk 4", "lora_rnk: unknown configuration key; did you mean lora_r?"),
        ("run --dry_run --train_file none.jsonl", "none.jsonl: no such file"),
        ("plan nope.yaml", "nope.yaml: no such configuration file"),
        ("partition nope.yaml", "nope.yaml: no such configuration file"),
        ("data my.yaml --show many", "--show many: expected a number of samples"),
        ("aggregate a b", "aggregate: give PEFT directories and --output DIR"),
        ("export out --rank 4 --energy 0.5", "--rank and --energy exclude each other"),
        ("config --lora_r 0", "lora_r: '0' must be at least 1"),
        ("config --schema my.yaml", "my.yaml: --schema is the same for all"),
        ("demo --method flora", "method: the demo compares"),
        ("watch", "watch: give the output directory of one run"),
        ("status", "status: give the output directory of one run"),
        ("report nowhere", "nowhere: no such directory"),
        ("eval nowhere", "nowhere"),
        ("generate", "generate: name a run's directory"),
        ("chat", "chat: name a run's directory"),
        ("study nothing", "nothing: no such study"),
        ("worker", "worker: give the site's file, as --site SITE.yaml"),
        ("deploy pigeons", "pigeons: deploy knows no such engine"),
        ("doctor now", "now: doctor has no such option"),
        ("completion tcsh", "completion: tcsh: expected one of bash, zsh, fish"),
        ("rn", "rn: no such verb; did you mean run?"),
    ],
)
def test_an_error_is_an_object(
    line: str, message: str, told: Told, capfd: pytest.CaptureFixture[str]
) -> None:
    (found,) = told(line, code=2)
    assert set(found) == {"event", "message"}
    assert found["event"] == "error"
    assert message in found["message"]
    # without --json the same words, for a person
    assert main(shlex.split(line)) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == f"fedlora: {found['message']}\n"


def test_errors_of_every_verb_are_tried() -> None:
    cases = test_an_error_is_an_object.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {line.split()[0] for line, _ in cases} >= set(VERBS)


def test_a_mistake_of_ours_is_an_object_too(
    told: Told, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr("fedlora.commands.config.settings", broken)
    with pytest.raises(ZeroDivisionError):
        main(["config", "--json"])
    said = json.loads(capfd.readouterr().out)
    assert said == {"event": "error", "message": "ZeroDivisionError: of the test"}


def test_help_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help", "--json"], ["run", "--json", "--help"], ["--json", "-h"]):
        assert main(argv) == 0
        assert capsys.readouterr().out.startswith("fedlora ")


def test_numbers_that_json_lacks_are_null(capfd: pytest.CaptureFixture[str]) -> None:
    with only_json() as emit:
        emit({"a": math.nan, "b": [math.inf, (1.0, -math.inf)], 3: {"c": torch.tensor(0.5)}})
    line = capfd.readouterr().out
    found = json.loads(line, parse_constant=no_constant)
    assert found["a"] is None
    assert found["b"] == [None, [1.0, None]]
    assert set(found) == {"a", "b", "3"}


def test_a_run_that_diverges_writes_json(told: Told) -> None:
    keys = "--learning_rate 1e30 --max_steps 3 --max_grad_norm 0"
    events = told(f"run my.yaml {keys}", code=0)
    assert events[-1]["event"] == "end"
    clients = [c for e in events if e["event"] == "round" for c in e["clients"]]
    assert any(c.get("rejected") for c in clients)
    assert None in [c["metrics"]["loss"] for c in clients]
