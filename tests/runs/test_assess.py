"""`fedlora eval` and `generate`: what is loaded, the run's own rows, forgetting, answers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedlora
from fedlora.commands.eval.assessment import Options, assess
from fedlora.commands.eval.models import load_models
from fedlora.commands.eval.options import Loading
from fedlora.commands.eval.subject import find_subject
from fedlora.commands.eval.verb import verb as eval_verb
from fedlora.commands.generate import verb as generate_verb
from fedlora.config.config import Config
from fedlora.config.sources import layered
from fedlora.config.yaml_file import read_yaml
from fedlora.embedded import BASE_DIR, CONFIG
from fedlora.errors import InputError
from fedlora.methods import rule_keys
from fedlora.runs.directory import RunDirectory, append_eval
from fedlora.runs.metrics_log import read_metrics
from support.rows import write_jsonl

pytestmark = pytest.mark.usefixtures("kept_bases")


GENERAL = "sort abc>abc reverse abc>cba upper abc>ABC double ab>aabb " * 20


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of the embedded default: two rounds, rows held out at every client."""
    path = tmp_path_factory.mktemp("runs") / "out"
    text = path.with_name("general.txt")
    text.write_text(GENERAL)
    values = {
        "num_rounds": 2,
        "max_steps": 2,
        "max_train_samples": 40,
        "max_eval_samples": 40,
        "client_eval_fraction": 0.1,
        "client_ranks": [8, 4],
        "save_client_models": True,
        "eval_personal": True,
        "general_file": str(text),
        "num_threads": 1,
        "cohort_size": 2,
        "output_dir": str(path),
    }
    fedlora.run(Config(**layered(read_yaml(CONFIG), values)))
    return path


@pytest.fixture
def run(run_directory: Path, tmp_path: Path) -> Path:
    """A copy of it, to write to."""
    return Path(shutil.copytree(run_directory, tmp_path / "out"))


def evals(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(name, model) -> scores in the run's log."""
    lines = [line for line in read_metrics(run) if line["event"] == "eval"]
    return {(line["name"], line["model"]): line["scores"] for line in lines}


def test_a_run_is_measured_as_it_measured_itself(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through PEFT's own loading: base, global model and clients', on all rows they ever saw."""
    log = read_metrics(run)
    start = next(line for line in log if line["event"] == "start")
    last = [line for line in log if line["event"] == "round"][-1]
    assert eval_verb([str(run)]) == 0
    found = evals(run)
    pairs = {
        ("held_out", "base"): start["evaluation"],
        ("held_out", "global"): last["evaluation"],
        ("held_out:client-0", "base"): start["client_evaluations"]["0"],
        ("held_out:client-1", "global"): last["client_evaluations"]["1"],
        ("held_out:client-0", "client-0"): last["personal_evaluations"]["0"],
        ("held_out:client-1", "client-1"): last["personal_evaluations"]["1"],
        ("general", "base"): start["general_evaluation"],
        ("general", "global"): last["general_evaluation"],
    }
    for key, wanted in pairs.items():
        assert found[key]["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert found[key].get("exact_match") == wanted.get("exact_match")
    assert start["evaluation"]["loss"] > last["evaluation"]["loss"] + 0.5  # they do differ
    assert found["held_out", "global"]["rows"] == 40
    assert (run / "eval" / "global-round-2" / "held_out.json").is_file()
    assert (run / "eval" / "base" / "held_out.client-1.json").is_file()
    shown = capsys.readouterr().out
    assert "held-out rows (40)" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if "eval" not in line)


def test_clients_models_stand_beside_the_global_one(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A client's own model on its own rows and on the common ones; no client on another's."""
    assert eval_verb([str(run), "--models", "global", "clients"]) == 0
    found = evals(run)
    assert {model for _, model in found} == {"global", "client-0", "client-1"}
    assert ("held_out:client-0", "client-1") not in found
    assert found["held_out", "client-1"]["loss"] != found["held_out", "client-0"]["loss"]
    assert "its own" in capsys.readouterr().out


def test_clients_of_a_round_that_is_not_the_last(run: Path) -> None:
    """As long as a run goes on, its clients' models lie in the round's directory."""
    shutil.rmtree(run / "final")
    subject = find_subject(Loading(str(run)))
    assert subject.models == ["base", "global", "client-0", "client-1"]
    assert subject.adapters["client-1"] == run / "round-2" / "client-1"


def test_where_clients_keep_a_part_there_is_no_global_model(run: Path) -> None:
    """The server's part of fedsa alone is no model, though a round's directory holds it."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config = {key: x for key, x in config.items() if key not in rule_keys()}
    config |= {"method": "fedsa", "client_ranks": [4, 4]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert find_subject(Loading(str(run), round=1)).models[:1] == ["base"]
    with pytest.raises(InputError, match="no global one"):
        eval_verb([str(run), "--models", "global"])


def test_the_log_keeps_a_line_for_every_measure_and_model(run: Path) -> None:
    line = {"event": "eval", "round": 2, "name": "mmlu", "model": "base", "scores": {"a": 1}}
    append_eval(run, line)
    append_eval(run, {**line, "model": "global"})
    append_eval(run, {**line, "scores": {"a": 2}})
    append_eval(run, {**line, "round": 1})
    assert evals(run)["mmlu", "global"] == {"a": 1}
    found = [x for x in read_metrics(run) if x["event"] == "eval"]
    assert [x["scores"] for x in found] == [{"a": 2}, {"a": 1}, {"a": 1}]
    assert len([x for x in read_metrics(run) if x["event"] == "round"]) == 2
    # What was measured of rounds that were undone does not count.
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"event": "resume", "round": 1}\n{"half')
    assert [x["round"] for x in read_metrics(run) if x["event"] == "eval"] == [1]
    append_eval(run, line)  # the half line is cut off first
    assert [x["round"] for x in read_metrics(run) if x["event"] == "eval"] == [1, 2]


def test_a_run_that_goes_on_is_left_alone(run: Path, tmp_path: Path) -> None:
    directory = RunDirectory(run)
    before = (run / "metrics.jsonl").read_bytes()
    try:
        with pytest.raises(InputError, match=r"another process is writing.*--output_dir"):
            eval_verb([str(run)])
        elsewhere = tmp_path / "elsewhere"
        assert eval_verb([str(run), "--output_dir", str(elsewhere), "--limit", "4"]) == 0
    finally:
        directory.close()
    assert (elsewhere / "global-round-2" / "held_out.json").is_file()
    assert (run / "metrics.jsonl").read_bytes() == before


def test_limit_and_models(run: Path) -> None:
    assert eval_verb([str(run), "--limit", "0.25", "--models", "global"]) == 0
    found = evals(run)
    assert {model for _, model in found} == {"global"}
    assert found["held_out", "global"]["rows"] == 10


def test_a_classifier_is_measured_on_its_rows(tmp_path: Path, tiny_llama: Path) -> None:
    data = [{"text": "ab" * (1 + i % 5), "label": "xyz"[i % 3]} for i in range(30)]
    path = tmp_path / "out"
    fedlora.run(
        Config(
            model_name_or_path=str(tiny_llama),
            train_file=str(write_jsonl(tmp_path / "data.jsonl", data)),
            label_column_name="label",
            eval_fraction=0.3,
            num_clients=2,
            lora_r=2,
            num_rounds=1,
            max_steps=2,
            num_threads=1,
            output_dir=str(path),
        )
    )
    assert eval_verb([str(path)]) == 0
    found, log = evals(path), read_metrics(path)
    assert {x["rows"] for x in found.values()} == {9}
    measured = {line["event"]: line["evaluation"] for line in log if line.get("evaluation")}
    assert found["held_out", "base"]["loss"] == pytest.approx(measured["start"]["loss"], rel=1e-4)
    assert found["held_out", "global"]["loss"] == pytest.approx(measured["round"]["loss"], rel=1e-4)
    with pytest.raises(InputError, match="is a classifier"):
        eval_verb([str(path), "--tasks", "arc_easy"])
    with pytest.raises(InputError, match="is a classifier"):
        generate_verb([str(path), "--prompt", "x"])


def test_a_run_without_an_end_is_taken_at_its_newest_whole_round(run: Path) -> None:
    shutil.rmtree(run / "final")
    subject = find_subject(Loading(str(run)))
    assert (subject.round, subject.adapters["global"].name) == (2, "round-2")
    assert "not complete" in subject.notes[0]
    (run / "round-2" / "adapter_model.safetensors").write_bytes(b"torn")
    subject = find_subject(Loading(str(run)))
    assert subject.round == 1
    assert any("damaged" in note for note in subject.notes)


def test_a_round_by_its_number(run: Path) -> None:
    assert find_subject(Loading(str(run), round=2)).adapters["global"].name == "final"
    assert find_subject(Loading(str(run), round=1)).adapters["global"].name == "round-1"
    with pytest.raises(InputError, match=r"holds no round-7.*1, 2"):
        find_subject(Loading(str(run), round=7))


def test_one_base_carries_all_adapters(run: Path) -> None:
    """Taking turns changes nothing: each is what PEFT makes of it alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    subject = find_subject(Loading(str(run)))
    models = load_models(subject, subject.models)
    ids = torch.tensor([[5, 9, 30, 41]])
    for name in ("global", "base", "client-0", "global"):
        alone = AutoModelForCausalLM.from_pretrained(BASE_DIR)
        if name != "base":
            alone = PeftModel.from_pretrained(alone, subject.adapters[name])
        with models.using(name) as model, torch.no_grad():
            assert torch.equal(model(ids).logits, alone.eval()(ids).logits)


def test_an_adapter_without_a_run(run_directory: Path, tmp_path: Path) -> None:
    """The base is the one it names, or --base; the template is not known."""
    path = Path(shutil.copytree(run_directory / "final", tmp_path / "apart"))
    shutil.rmtree(path / "client-0")
    subject = find_subject(Loading(str(path)))
    assert (subject.models, subject.of_a_run) == (["base", "adapter", "client-1"], False)
    inside = find_subject(Loading(str(run_directory / "final")))
    assert (inside.models[1:3], inside.of_a_run) == (["adapter", "client-0"], True)
    one = find_subject(Loading(str(run_directory / "final" / "client-1")))
    assert (one.models, one.of_a_run) == (["base", "adapter"], True)
    config = json.loads((path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone"
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="--base"):
        find_subject(Loading(str(path)))
    subject = find_subject(Loading(str(path), base="embedded"))
    assert load_models(subject, ["base", "adapter"]).peft is not None


def test_an_adapter_that_does_not_fit(
    run_directory: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    path = Path(shutil.copytree(run_directory / "final", tmp_path / "apart"))
    subject = find_subject(Loading(str(path), base=str(tiny_llama)))
    with pytest.raises(InputError, match=r"cannot be loaded.*--base"):
        load_models(subject, ["adapter"])


def test_forgetting_of_a_run(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "general.txt"
    text.write_text(GENERAL)
    assert eval_verb([str(run), "--general_file", str(text), "--limit", "8"]) == 0
    found = evals(run)
    difference = found["general", "global"]["loss"] - found["general", "base"]["loss"]
    assert found["general", "global"]["forgetting"] == pytest.approx(difference, abs=1e-6)
    low, high = (found["general", "global"][f"forgetting_{end}"] for end in ("low", "high"))
    assert low < difference < high
    assert found["general", "base"]["windows"] == 8
    assert ("held_out", "global") in found  # own rows too, unless other tasks are asked for


def test_forgetting_of_an_adapter(run_directory: Path, tmp_path: Path) -> None:
    """Without a run there are no rows but the text's; results go to a directory of its own."""
    path = Path(shutil.copytree(run_directory / "final", tmp_path / "apart"))
    text = tmp_path / "general.txt"
    text.write_text(GENERAL)
    found = tmp_path / "found"
    assert eval_verb([str(path), "--general_file", str(text), "--output_dir", str(found)]) == 0
    scores = json.loads((found / "adapter" / "general.json").read_text())["scores"]
    assert scores["forgetting"] != 0
    assert sorted(p.name for p in found.rglob("*.json")) == ["general.json", "general.json"]


def test_generate_shows_models_beside_each_other(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the run's own measure counts as an exact match is what is generated."""
    out = tmp_path / "said.jsonl"
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "upper abc>"}])
    arguments = [str(run), "--prompt", "reverse abc>", "sort cab>", "--prompts_file", str(prompts)]
    assert generate_verb([*arguments, "--output", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [x["prompt"] for x in found] == ["reverse abc>", "sort cab>", "upper abc>"]
    assert all(list(x["answers"]) == ["base", "global"] for x in found)
    # The base knows the symbolic form: it was trained on it.
    assert [x["answers"]["base"] for x in found] == ["cba", "abc", "ABC"]
    assert "reverse abc>" in capsys.readouterr().out


def test_generate_asks_held_out_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_verb([str(run), "--model", "global"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("reference") == 3
    assert "base" not in shown


def test_results_hold_no_infinity(run: Path) -> None:
    from fedlora.commands.eval.results import open_results

    results = open_results(find_subject(Loading(str(run))), None)
    results.record("lm_eval:a/b", "base", {"x": math.inf}, {"y": math.nan}, [{"z": math.inf}])
    assert evals(run)["lm_eval:a/b", "base"] == {"x": None}
    assert (run / "eval" / "base" / "lm_eval.a.b.items.jsonl").read_text() == '{"z": null}\n'


def test_from_python(run_directory: Path, tmp_path: Path) -> None:
    options = Options(Loading(str(run_directory)), limit=4, output_dir=str(tmp_path / "found"))
    found = assess(options).of("held_out")
    assert list(found) == ["base", "global", "client-0", "client-1"]
