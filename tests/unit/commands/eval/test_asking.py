"""A prompt in the form that a model was trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.eval.asking import Asker, encode, prompt_format_of, read_prompts
from fedlora.commands.eval.models import tokenizer_of
from fedlora.commands.eval.options import Loading
from fedlora.commands.eval.subject import Subject, find_subject
from fedlora.config.config import Config
from fedlora.errors import InputError
from support.rows import write_jsonl
from support.tokens import CHATML, with_chat


def asker(tiny_llama: Path, chat: str = "", raw: bool = False, **keys: Any) -> tuple[Asker, Any]:
    """Of a run that was trained so."""
    subject, tokenizer = model(tiny_llama)
    if keys:
        subject = replace(subject, config=Config(**keys), of_a_run=True)
    tokenizer = with_chat(tokenizer, chat) if chat else tokenizer
    return Asker(subject, tokenizer, raw), tokenizer


def model(tiny_llama: Path) -> tuple[Subject, Any]:
    """A model by itself."""
    subject = find_subject(Loading(str(tiny_llama)))
    return subject, tokenizer_of(subject)


def read(tokenizer: Any, ids: Any) -> str:
    """The text of tokens."""
    return str(tokenizer.decode(list(ids)))


def test_an_instruction_gets_its_runs_form(tiny_llama: Path) -> None:
    it, tokenizer = asker(tiny_llama, template="alpaca")
    prompt = it.text("say hi")
    assert prompt.shown == "say hi"
    assert read(tokenizer, prompt.ids).endswith("### Instruction:\nsay hi\n\n### Response:\n")
    it, tokenizer = asker(tiny_llama, template="custom", prompt_template="Q: {q}\nA: ",
                          completion_template="{a}")  # fmt: skip
    assert read(tokenizer, it.text("why?").ids) == "Q: why?\nA: "
    it, tokenizer = asker(tiny_llama, raw=True, template="alpaca")
    assert read(tokenizer, it.text("say hi").ids) == "say hi"


def test_rows_bring_their_references(tiny_llama: Path) -> None:
    it, tokenizer = asker(tiny_llama, template="prompt_completion")
    prompt = it.row({"prompt": "abc>", "completion": " cba "})
    assert (prompt.shown, prompt.reference) == ("abc>", "cba")
    assert it.row({"prompt": "abc>"}).reference is None
    it, tokenizer = asker(tiny_llama, CHATML)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    prompt = it.row({"messages": turns})
    assert prompt.reference == "hello"
    assert read(tokenizer, prompt.ids).endswith("hi<|im_end|>\n<|im_start|>assistant\n")
    assert it.row({"messages": turns[:1]}).reference is None


def test_a_prompt_of_several_columns_is_no_single_text(tiny_llama: Path) -> None:
    it, _ = asker(
        tiny_llama, template="custom", prompt_template="{a} {b}", completion_template="{c}"
    )
    with pytest.raises(InputError, match="prompt_template has the columns a, b; give rows"):
        it.text("x")
    with pytest.raises(InputError, match="a row has the columns d; expected a, b, or prompt"):
        it.row({"d": 1})


def test_prompts_of_a_file(tiny_llama: Path, tmp_path: Path) -> None:
    it, _ = asker(tiny_llama)
    (tmp_path / "a.txt").write_text("one\n\n two\n")
    assert [p.shown for p in read_prompts(tmp_path / "a.txt", it)] == ["one", " two"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, {"other": "y"}])
    with pytest.raises(InputError, match=r"a\.jsonl: row 2: a row has the columns other"):
        read_prompts(path, it)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt", it)


def test_conversations_without_a_template_are_vicunas(tiny_llama: Path) -> None:
    subject, tokenizer = model(tiny_llama)
    form = prompt_format_of(subject, tokenizer)
    assert form.name.startswith("Vicuna's template")
    text = read(tokenizer, form.tokens([{"role": "user", "content": "hi"}]))
    assert text.endswith("USER: hi ASSISTANT:")
    assert encode(tokenizer, "ab") == tokenizer("ab")["input_ids"]
