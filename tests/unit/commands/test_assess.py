"""Generating and evaluating: options, windows of texts, losses, prompts as they were trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

from fedlora.client.evaluate import evaluate
from fedlora.commands.cli import main
from fedlora.commands.eval.asking import Asker, answers, prompt_format_of, read_prompts
from fedlora.commands.eval.general import Losses, forgetting, measured
from fedlora.commands.eval.models import load_models, tokenizer_of
from fedlora.commands.eval.options import Given, Loading, first
from fedlora.commands.eval.subject import find_subject
from fedlora.commands.eval.verb import HELP
from fedlora.commands.eval.verb import verb as eval_verb
from fedlora.config.config import Config
from fedlora.data.general_text import windows
from fedlora.data.templates import TEMPLATES
from fedlora.data.tokenize import IGNORE, tokenize
from fedlora.errors import InputError
from support.rows import rows, write_jsonl


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
    form = prompt_format_of(subject, tokenizer)
    text = tokenizer.decode(form.tokens(turns))
    assert "Vicuna" in form.name
    assert text.endswith("USER: one ASSISTANT: two</s>USER: three ASSISTANT:")
    config = Config(template="alpaca")
    alpaca = replace(subject, config=config, of_a_run=True)
    text = tokenizer.decode(prompt_format_of(alpaca, tokenizer).tokens(turns))
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
