"""`fedlora eval` and `generate`: what is loaded, the run's own rows, forgetting, answers."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy.stats import ttest_rel

import fedlora
from conftest import rows, write_jsonl
from fedlora.client.evaluate import evaluate
from fedlora.commands.cli import main
from fedlora.commands.eval.asking import Asker, answers, conversation_form, read_prompts
from fedlora.commands.eval.assessment import Options, assess
from fedlora.commands.eval.general import Losses, forgetting, measured
from fedlora.commands.eval.models import load_models, tokenizer_of
from fedlora.commands.eval.options import Given, Loading, first
from fedlora.commands.eval.subject import find_subject
from fedlora.commands.eval.verb import HELP
from fedlora.commands.eval.verb import verb as eval_verb
from fedlora.commands.generate import verb as generate_verb
from fedlora.config.config import Config
from fedlora.config.sources import layered, read_yaml
from fedlora.data.general_text import windows
from fedlora.data.templates import TEMPLATES
from fedlora.data.tokenize import IGNORE, tokenize
from fedlora.embedded import BASE_DIR, CONFIG
from fedlora.errors import InputError
from fedlora.methods import rule_keys
from fedlora.runs.directory import RunDirectory, append_eval
from fedlora.runs.metrics_log import read_metrics

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


# --- a run's own rows ---


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


# --- what is loaded ---


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


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "name a run"),
        (["--tasks", "x"], "name a run"),
        (["./nowhere"], "no such directory"),
        (["embedded"], "is no run"),
        (["embedded", "--task", "x"], "did you mean tasks"),
        (["embedded", "--held_out", "true"], "is no run"),
        (["embedded", "--round", "1"], "no run with rounds"),
        (["embedded", "--mmlu_file", "gone.jsonl"], "no such file"),
        (["embedded", "--limit", "0"], "--limit"),
        (["embedded", "--limit", "many"], "--limit"),
        (["embedded", "--dtype", "int4"], "none of auto"),
        (["embedded", "--device", "tpu"], "expected cpu or cuda"),
        (["embedded", "--batch_size", "-1"], "whole number"),
        (["embedded", "--num_fewshot", "2", "--mmlu_file", __file__], "mmlu_dev_file"),
        (["embedded", "--judge_url", "http://x"], "mt_bench_file|is no run"),
        (["embedded", "--models", "global", "--tasks", "x"], "there are base"),
        (["embedded", "--models", "client-1", "--tasks", "x"], "save_client_models"),
    ],
)
def test_mistakes_are_told(arguments: list[str], wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        eval_verb(arguments)


def test_a_directory_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        eval_verb([str(tmp_path)])


def test_the_command_line_knows_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help"]) == 0
    assert capsys.readouterr().out == HELP
    assert all(len(line) <= 100 for line in HELP.splitlines())
    assert main(["generate", "embedded"]) == 2
    assert "give --prompt" in capsys.readouterr().err


def test_options() -> None:
    given = Given("eval", ["x", "--raw", "--n=3", "--names", "a", "none"], ["raw", "n", "names"])
    assert given.flag("raw") is True
    assert given.whole("n") == 3
    assert given.listed("names") == ("a", "none")
    assert given.text("gone") is None
    assert first(range(10), 0.25) == range(3)
    assert first(range(10), 4) == range(4)
    assert first([1], None) == [1]


# --- general text ---


def test_windows_hold_all_the_text_once(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = tokenizer_of(find_subject(Loading(str(tiny_llama))))
    path = tmp_path / "general.txt"
    path.write_text("The quick brown fox. " * 20)
    found = windows(tokenizer, path, 32)
    assert all(len(row["input_ids"]) == 32 for row in found[:-1])
    assert all(row["labels"] == [IGNORE, *row["input_ids"][1:]] for row in found)
    text = "".join(tokenizer.decode(row["input_ids"]) for row in found)
    assert text == path.read_text()
    assert [row["input_ids"] for row in windows(tokenizer, path, 32, 2)] == [
        row["input_ids"] for row in found[:2]
    ]


def test_windows_of_rows_begin_as_texts_do(tmp_path: Path, material: Path) -> None:
    """With BOS where the tokenizer has one, end-of-text between documents."""
    tokenizer = tokenizer_of(find_subject(Loading(str(material / "models" / "stories260K"))))
    path = write_jsonl(tmp_path / "general.jsonl", [{"text": "One day."}, {"text": "The sun."}])
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    (row,) = windows(tokenizer, path, 256)
    assert begins == (row["input_ids"][0] == tokenizer.bos_token_id)
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1


def test_windows_refuse_other_files(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = tokenizer_of(find_subject(Loading(str(tiny_llama))))
    with pytest.raises(InputError, match="no column text"):
        windows(tokenizer, write_jsonl(tmp_path / "a.jsonl", rows(2)), 16)
    with pytest.raises(InputError, match="cannot be read"):
        windows(tokenizer, tmp_path / "gone.txt", 16)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="UTF-8"):
        windows(tokenizer, tmp_path / "b.txt", 16)
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(InputError, match="no text"):
        windows(tokenizer, tmp_path / "c.txt", 16)


def test_losses_are_those_of_evaluate(tmp_path: Path, tiny_gpt2: Path) -> None:
    subject = find_subject(Loading(str(tiny_gpt2)))
    models = load_models(subject, ["base"])
    path = tmp_path / "general.txt"
    path.write_text("Nothing is as it was, said the fox to the hen. " * 4)
    found = windows(models.tokenizer, path, 40)
    with models.using("base") as model:
        ours = measured(model, found, 2)
        wanted = evaluate(model, models.tokenizer, found, batch_size=8)
    assert ours.loss == pytest.approx(wanted["loss"], rel=1e-5)
    assert ours.scores["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)
    assert ours.counts == [39, 39, 39, 39, len(found[-1]["input_ids"]) - 1]


def test_forgetting_is_a_paired_difference() -> None:
    """For windows of one length the interval is that of a paired t-test."""
    base, tuned = [20.0, 31.0, 25.0, 40.0], [21.0, 33.0, 25.5, 44.0]
    found = forgetting(Losses(tuned, [10] * 4), Losses(base, [10] * 4))
    interval = ttest_rel([x / 10 for x in tuned], [x / 10 for x in base]).confidence_interval(0.95)
    assert found["forgetting"] == pytest.approx(0.1875)
    assert found["forgetting_low"] == pytest.approx(interval.low)
    assert found["forgetting_high"] == pytest.approx(interval.high)
    one = forgetting(Losses([3.0], [2]), Losses([2.0], [2]))
    assert (one["forgetting"], one["forgetting_low"]) == (0.5, None)


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


# --- answers ---


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


def test_what_is_asked_is_what_was_trained_on(tmp_path: Path, tiny_llama: Path) -> None:
    """The tokens of a prompt are those that stand before the answer in training."""
    subject = find_subject(Loading(str(tiny_llama)))
    tokenizer = tokenizer_of(subject)
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"template": "alpaca"}, {"instruction": "Say it.", "output": "It."}),
        (
            {"template": "alpaca"},
            {"instruction": "Say it.", "context": "The hen.", "response": "It."},
        ),
        ({"template": "prompt_completion"}, {"prompt": "2+2=", "completion": "4"}),
        (
            {"template": "custom", "prompt_template": "Q:{q}A:", "completion_template": "{a}"},
            {"q": "why", "a": "so"},
        ),
        (
            {"template": "chat", "chat_template_path": "vicuna"},
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Ho"},
                ]
            },
        ),
    ]
    for keys, row in cases:
        config = Config(model_name_or_path=str(tiny_llama), **keys)
        changed = replace(subject, config=config, of_a_run=True)
        tokenizer = tokenizer_of(changed)
        asker = Asker(changed, tokenizer)
        prompt = asker.row(row)
        trained = tokenize(row, asker.template, tokenizer, 1000, True)
        cut = next(i for i, x in enumerate(trained["labels"]) if x != IGNORE)
        lead = trained["input_ids"][:cut]
        assert list(prompt.ids) == lead
        assert prompt.reference in ("It.", "4", "so", "Ho")
        blank = {k: v for k, v in row.items() if k not in ("output", "response", "completion", "a")}
        if "messages" in row:
            blank = {"messages": row["messages"][:1]}
        assert asker.row(blank).ids == prompt.ids
        assert asker.row(blank).reference is None
        if "context" not in row:
            text = {"alpaca": "Say it.", "chat": "Hi", "custom": "why"}.get(asker.name, "2+2=")
            assert asker.text(text).ids == prompt.ids


def test_prompts_that_cannot_be_read(tmp_path: Path, tiny_llama: Path) -> None:
    subject = find_subject(Loading(str(tiny_llama)))
    tokenizer = tokenizer_of(subject)
    config = Config(prompt_template="{a}{b}", completion_template="{c}", template="custom")
    asker = Asker(replace(subject, config=config, of_a_run=True), tokenizer)
    with pytest.raises(InputError, match="columns a, b"):
        asker.text("what")
    with pytest.raises(InputError, match=r"row 2.*expected a, b"):
        read_prompts(write_jsonl(tmp_path / "p.jsonl", [{"a": "1", "b": "2"}, {"z": 1}]), asker)
    (tmp_path / "p.txt").write_text("\n\n")
    with pytest.raises(InputError, match="no prompt"):
        read_prompts(tmp_path / "p.txt", Asker(subject, tokenizer))
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    found = read_prompts(tmp_path / "p.txt", Asker(subject, tokenizer))
    assert [p.shown for p in found] == ["one", "two"]


def test_raw_prompts_are_taken_as_they_are(tiny_llama: Path) -> None:
    subject = find_subject(Loading(str(tiny_llama), chat_template_path="vicuna"))
    tokenizer = tokenizer_of(subject)
    assert list(Asker(subject, tokenizer, raw=True).text("ab").ids) == tokenizer("ab")["input_ids"]
    chat = tokenizer.decode(list(Asker(subject, tokenizer).text("ab").ids))
    assert "USER: ab ASSISTANT:" in chat


def test_conversations_of_several_turns(tiny_llama: Path) -> None:
    subject = find_subject(Loading(str(tiny_llama)))
    tokenizer = tokenizer_of(subject)
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    form = conversation_form(subject, tokenizer)
    text = tokenizer.decode(form.tokens(turns))
    assert "Vicuna" in form.name
    assert text.endswith("USER: one ASSISTANT: two</s>USER: three ASSISTANT:")
    config = Config(template="alpaca")
    alpaca = replace(subject, config=config, of_a_run=True)
    text = tokenizer.decode(conversation_form(alpaca, tokenizer).tokens(turns))
    rendered = TEMPLATES["alpaca"].render({"instruction": "one", "output": ""})
    assert isinstance(rendered, tuple)
    assert text == f"{rendered[0]}two\n\n### Instruction:\nthree\n\n### Response:\n"


def test_a_prompt_too_long_loses_its_beginning(tiny_gpt2: Path) -> None:
    """At least half of the context is the prompt's; nothing fails at the context's end."""
    models = load_models(find_subject(Loading(str(tiny_gpt2))), ["base"])
    with models.using("base") as model:
        said, cut = answers(
            model,
            models.tokenizer,
            [[5] * 300, [6] * 10],
            max_new_tokens=1000,
            context=models.context,
            batch_size=2,
        )
    assert models.context == 128
    assert cut == [True, False]
    assert len(said) == 2


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
