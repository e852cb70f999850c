"""Puts a prompt into the form that a model was trained on, and generates its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from jinja2 import TemplateError

from fedlora.client.generation import generate
from fedlora.commands.eval.subject import Subject
from fedlora.data.chat_messages import UnusableRowError
from fedlora.data.rendered import Chat, Turns, learnt_part
from fedlora.data.row_files import read_rows
from fedlora.data.templates import BUILT_IN_CHAT, TEMPLATES, Template, custom
from fedlora.errors import InputError

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """Something to answer.

    Args:
        shown: what a person asked.
        ids: its tokens, as the model reads it.
        reference: the answer that stands in the data; None: there is none.
    """

    shown: str
    ids: tuple[int, ...]
    reference: str | None = None


@dataclass(frozen=True)
class PromptFormat:
    """How conversations become tokens.

    Args:
        name: for people.
        tokens: turns of user and assistant -> tokens up to the assistant's next words.
    """

    name: str
    tokens: Callable[[Messages], list[int]]


def encode(tokenizer: Any, text: str) -> list[int]:
    """A text that goes on: without the end-of-text token that some tokenizers add."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _chat_tokens(tokenizer: Any, messages: Messages, template: str | None = None) -> list[int]:
    """Messages as the chat template renders them, up to the assistant's next words."""
    try:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tokenize=False,
            add_generation_prompt=True,
            chat_template=template,
        )
    except (TemplateError, ValueError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"the chat template refuses a prompt: {why}") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _alpaca_turns(tokenizer: Any, messages: Messages) -> list[int]:
    """Alpaca's prompt; later turns repeat its blocks, as FastChat's alpaca conversation does."""
    first, *later = messages
    rendered = TEMPLATES["alpaca"].render({"instruction": first["content"], "output": ""})
    assert isinstance(rendered, tuple)
    text = rendered[0]
    for message in later:
        if message["role"] == "assistant":
            text += f"{message['content']}\n\n"
        else:
            text += f"### Instruction:\n{message['content']}\n\n### Response:\n"
    return encode(tokenizer, text)


def prompt_format_of(
    subject: Subject, tokenizer: Any, chat_asked_for: bool = False
) -> PromptFormat:
    """How a chat is put to this model.

    Alpaca's prompt for a run that was trained on Alpaca rows, else the tokenizer's chat template,
    else Vicuna's.

    Args:
        subject: the model, and what it was trained on.
        tokenizer: its tokenizer.
        chat_asked_for: the user names a chat template, which goes before all.
    """
    if subject.of_a_run and subject.config.template == "alpaca" and not chat_asked_for:
        return PromptFormat(
            "Alpaca's prompt, as in training", lambda m: _alpaca_turns(tokenizer, m)
        )
    if getattr(tokenizer, "chat_template", None):
        return PromptFormat("the tokenizer's chat template", lambda m: _chat_tokens(tokenizer, m))
    vicuna = BUILT_IN_CHAT["vicuna"].read_text(encoding="utf-8")
    return PromptFormat(
        "Vicuna's template (the tokenizer has none)", lambda m: _chat_tokens(tokenizer, m, vicuna)
    )


# --- prompts of a user ---


class Asker:
    """Makes prompts of what a user gives, in the form of the run.

    Args:
        subject: the run, adapter or model.
        tokenizer: its tokenizer.
        raw: take every text as it is.
    """

    def __init__(self, subject: Subject, tokenizer: Any, raw: bool = False) -> None:
        self.tokenizer, config = tokenizer, subject.config
        chats = bool(getattr(tokenizer, "chat_template", None))
        name = config.template if subject.of_a_run else "auto"
        if raw:
            name = "text"
        elif name in ("auto", "classification"):
            name = "chat" if chats else "text"
        self.name = name
        if name == "custom":
            self.template = custom(config.prompt_template or "", config.completion_template or "")
        else:
            self.template = TEMPLATES[name]
        parts = Formatter().parse(config.prompt_template or "") if name == "custom" else ()
        self.columns = list(dict.fromkeys(x for _, x, _, _ in parts if x))

    def text(self, text: str) -> Prompt:
        """A prompt of one text: an instruction, a user's turn, or the prompt itself.

        Raises:
            InputError: the run's own template has several columns.
        """
        if self.name == "alpaca":
            return self._of(self.template, {"instruction": text, "output": ""}, text)
        if self.name == "chat":
            return Prompt(text, tuple(self._turns([{"role": "user", "content": text}])))
        if self.name == "custom" and self.columns:
            if len(self.columns) > 1:
                raise InputError(
                    f"--prompt: the run's prompt_template has the columns "
                    f"{', '.join(self.columns)}; give rows with them (--prompts_file F.jsonl), or "
                    "--raw and the whole prompt"
                )
            return self._of(self.template, {self.columns[0]: text}, text)
        return Prompt(text, tuple(encode(self.tokenizer, text)))

    def row(self, row: Mapping[str, Any]) -> Prompt:
        """A row of the run's kind, with its answer or without, or one that holds a single text.

        Raises:
            InputError: what it holds cannot be read as a prompt.
        """
        filled = {**row, **self._blanks(row)}
        lacks = [name for name in self.columns if name not in row]
        if self.name != "text" and not self.template.missing(list(filled)) and not lacks:
            return self._of(self.template, filled, None)
        for key in ("prompt", "instruction", "question", "text"):
            if isinstance(row.get(key), str):
                return self.text(row[key])
        wanted = self.columns or [" or ".join(names) for names in self.template.columns[:1]]
        raise InputError(
            f"a row has the columns {', '.join(map(str, row))}; expected {', '.join(wanted)}, or "
            "prompt"
        )

    def _blanks(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What stands where the row has no answer; the template wants one."""
        if self.name == "chat":
            key = "messages" if row.get("messages") is not None else "conversations"
            turns = row.get(key)
            if not isinstance(turns, list) or not turns or not isinstance(turns[-1], Mapping):
                return {}
            if "from" in turns[-1]:
                ends = turns[-1]["from"] not in ("human", "user")
                return {} if ends else {key: [*turns, {"from": "gpt", "value": _BLANK}]}
            ends = turns[-1].get("role") == "assistant"
            return {} if ends else {key: [*turns, {"role": "assistant", "content": _BLANK}]}
        if self.name == "preference" and (row.get("chosen") is None or row.get("rejected") is None):
            turns = isinstance(row.get("prompt") or row.get("conversations"), list)
            answers = ("", _BLANK)  # they have to differ
            return {
                key: {"role": "assistant", "content": answer} if turns else answer
                for key, answer in zip(("rejected", "chosen"), answers, strict=True)
            }
        if self.name == "prompt_completion" and row.get("completion") is None:
            return {"completion": [] if isinstance(row.get("prompt"), list) else ""}
        if self.name == "custom":
            learnt = (name for names in self.template.columns for name in names)
            return {n: "" for n in learnt if row.get(n) is None and n not in self.columns}
        if self.name == "alpaca" and row.get("output") is None and row.get("response") is None:
            return {"output": ""}
        return {}

    def _of(self, template: Template, row: Mapping[str, Any], shown: str | None) -> Prompt:
        """A row of the run's kind as a prompt, with its answer as the reference."""
        try:
            rendered = learnt_part(template.render(row))
        except UnusableRowError as error:
            raise InputError(f"a row cannot be asked: {error}") from None
        if isinstance(rendered, Chat):
            return self._of_chat(rendered)
        if isinstance(rendered, Turns):  # earlier turns stand before the prompt
            *earlier, (before, after) = rendered.pairs
            end = str(self.tokenizer.eos_token)
            before = "".join(f"{question}{answer}{end}" for question, answer in earlier) + before
        else:
            assert isinstance(rendered, tuple)
            before, after = rendered
        if shown is None and self.name == "alpaca":
            context = str(row.get("input") or row.get("context") or "").strip()
            shown = str(row["instruction"]) + (f"\n{context}" if context else "")
        ids = tuple(encode(self.tokenizer, before))
        return Prompt(before if shown is None else shown, ids, after.strip() or None)

    def _of_chat(self, chat: Chat) -> Prompt:
        cut = len(chat.messages) - 1 if chat.prompt is None else chat.prompt
        before, after = chat.messages[:cut], chat.messages[cut:]
        reference = str(after[0].get("content", "")) if after else _BLANK
        spoken = [(m["role"], str(m.get("content", ""))) for m in before]
        shown = "\n".join(text if who == "user" else f"[{who}] {text}" for who, text in spoken)
        known = None if reference == _BLANK else reference.strip()
        return Prompt(shown, tuple(self._turns(before)), known)

    def _turns(self, messages: Messages) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            return _chat_tokens(self.tokenizer, messages)
        vicuna = BUILT_IN_CHAT["vicuna"].read_text(encoding="utf-8")
        return _chat_tokens(self.tokenizer, messages, vicuna)


_BLANK = "\ue000"
"""An answer that is not there: a character of Unicode's private use, which no text has."""


def read_prompts(path: Path, asker: Asker) -> list[Prompt]:
    """The prompts of a file: rows (JSON, JSONL, CSV, Parquet), or plain text, one on each line.

    Raises:
        InputError: the file cannot be read, is empty, or a row is no prompt (with its number).
    """
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson", ".csv", ".parquet"):
        out = []
        for number, row in enumerate(read_rows(path), 1):
            try:
                out.append(asker.row(row))
            except InputError as error:
                raise InputError(f"{path}: row {number}: {error}") from None
        return out
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    prompts = [asker.text(line) for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts


# --- answers ---


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    context: int,
    batch_size: int,
) -> tuple[list[str], list[bool]]:
    """Greedy answers; a prompt that does not fit loses its beginning.

    At least half of the context is the prompt's, the rest or `max_new_tokens` the answer's.

    Args:
        model: of transformers.
        tokenizer: the model's.
        prompts: tokens.
        max_new_tokens: longest answer.
        context: the model's, in tokens.
        batch_size: prompts at once.

    Returns:
        The answers, and which prompts were cut.
    """
    room = max(context - max_new_tokens, context // 2, 1)
    new = min(max_new_tokens, context - room)
    shortened = [ids if len(ids) <= room else ids[-room:] for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(shortened[i]))
    by_number: dict[int, str] = {}
    for at in range(0, len(order), batch_size):
        part = order[at : at + batch_size]
        texts = generate(model, tokenizer, [shortened[i] for i in part], new)
        by_number |= dict(zip(part, texts, strict=True))
    cut = [len(ids) > room for ids in prompts]
    return [by_number[i] for i in range(len(prompts))], cut
