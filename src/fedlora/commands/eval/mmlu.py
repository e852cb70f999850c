"""Scores MMLU (arXiv 2009.03300) from a local file by the log-likelihood of the options' letters.

The prompt is the usual one, as the public harness has it:

    The following are multiple choice questions (with answers) about SUBJECT.

    QUESTION
    A. ...
    D. ...
    Answer:

and what is compared is `log p(" A" | prompt)` ... `log p(" D" | prompt)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.commands.eval.likelihood import cross_entropy, per_row
from fedlora.commands.eval.options import first
from fedlora.data.row_files import read_rows
from fedlora.data.rows import Row
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.errors import InputError
from fedlora.text import natural

LETTERS = "ABCDEFGHIJ"
_ANSWER = re.compile(
    r"^\s*(?i:(?:the )?(?:correct )?(?:answer)?(?: is)?:?)\s*\(?([A-J])\b\)?[.:)]?\s*(.*)$", re.S
)
_QUESTION = re.compile(r"^\s*(?:Question|Qusetion)\s*:\s*")
_OPTIONS = re.compile(r"\s*(?:Options|Choices)\s*:\s*")


@dataclass(frozen=True)
class Item:
    """A question.

    Args:
        subject: such as `abstract_algebra`.
        question: its text.
        choices: the options' texts.
        answer: which of them is right, from 0.
    """

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int

    def text(self) -> str:
        """The question as the prompt has it, up to `Answer:`."""
        options = "".join(f"{LETTERS[i]}. {x}\n" for i, x in enumerate(self.choices))
        return f"{self.question.strip()}\n{options}Answer:"


# --- reading ---


def read_items(path: str | Path) -> list[Item]:
    """The questions of a file.

    Rows are those of the hub (question, choices, answer, subject), or instructions whose `input`
    holds the question and `Options: A. ..., B. ...`, whose `output` names the answer, and whose
    `class` is the subject.

    Raises:
        InputError: the file cannot be read, or a row is neither (with its number).
    """
    out = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            out.append(_item(row))
        except ValueError as error:
            raise InputError(
                f"{path}: row {number}: {error}; expected question, choices, answer and subject, "
                "or input with 'Options: A. ..., B. ...', output and class"
            ) from None
    return out


def _item(row: Row) -> Item:
    """A question from a row, in either of the shapes that `read_items` knows."""
    subject = str(row.get("subject") or row.get("class") or row.get("category") or "all")
    if row.get("choices") is not None and row.get("question") is not None:
        choices = row["choices"]
        if isinstance(choices, str):  # a cell of CSV
            choices = json.loads(choices)
        if not isinstance(choices, Sequence) or not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"choices: {str(choices)[:60]!r}")
        answer = _index(row.get("answer"), len(choices))
        return Item(subject, str(row["question"]), tuple(map(str, choices)), answer)
    if isinstance(row.get("input"), str) and isinstance(row.get("output"), str):
        return _from_text(subject, row["input"], row["output"])
    raise ValueError("it has the columns " + ", ".join(map(str, row)))


def _index(answer: Any, number: int) -> int:
    text = str(answer).strip()
    index = int(text) if text.isdecimal() else LETTERS.find(text.upper()) if len(text) == 1 else -1
    if not 0 <= index < number:
        raise ValueError(f"answer: {answer!r} is none of the {number} choices")
    return index


def _from_text(subject: str, text: str, output: str) -> Item:
    """A question with its options in one text; the answer's own text tells where options end."""
    match = _ANSWER.match(output)
    if not match:
        raise ValueError(f"output: {output[:60]!r} names no letter")
    letter, stated = LETTERS.index(match.group(1)), match.group(2).strip()
    candidates = [
        (text[: match.start()], options)
        for match in _OPTIONS.finditer(text)
        for options in _splits(text[match.end() :])
        if letter < len(options)
    ]
    if not candidates:
        raise ValueError(f"input: no 'Options: A. ..., B. ...' in {text[-60:]!r}")
    fitting = [c for c in candidates if not stated or c[1][letter] == stated]
    if not fitting:
        raise ValueError(
            f"output: {stated[:60]!r} is not what stands at {LETTERS[letter]} in the options"
        )
    # Where texts of options hold ', B. ' themselves: the most options, behind the last 'Options:'.
    question, options = max(fitting, key=lambda c: (len(c[1]), len(c[0])))
    return Item(subject, _QUESTION.sub("", question).strip(), options, letter)


def _splits(text: str) -> list[tuple[str, ...]]:
    """Every way to read `A. ..., B. ..., C. ...`, commas within options or not."""
    if not (begin := re.match(r"A[.):]\s*", text)):
        return []
    out: list[tuple[str, ...]] = []

    def go_on(at: int, options: tuple[str, ...]) -> None:
        if len(options) >= 1:
            out.append((*options, text[at:].strip()))
        if len(options) + 1 < len(LETTERS) and len(out) < 10_000:
            mark = re.compile(rf"(?:,|;|\n)\s*{LETTERS[len(options) + 1]}[.):]\s*")
            for match in mark.finditer(text, at):
                go_on(match.end(), (*options, text[at : match.start()].strip()))

    go_on(begin.end(), ())
    return out


# --- scoring ---


def shots(items: Sequence[Item], number: int) -> dict[str, list[Item]]:
    """The first `number` worked examples of each subject."""
    out: dict[str, list[Item]] = {}
    for item in items:
        if len(out.setdefault(item.subject, [])) < number:
            out[item.subject].append(item)
    return out


def limited(items: Sequence[Item], limit: int | float | None) -> list[Item]:
    """The first items of every subject, as the harness limits its tasks."""
    by_subject: dict[str, list[Item]] = {}
    for item in items:
        by_subject.setdefault(item.subject, []).append(item)
    return [item for part in by_subject.values() for item in first(part, limit)]


def prompt(item: Item, examples: Sequence[Item] = ()) -> str:
    """What stands before the letter."""
    subject = item.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    worked = "".join(f"{x.text()} {LETTERS[x.answer]}\n\n" for x in examples)
    return head + worked + item.text()


def log_likelihoods(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    batch_size: int,
    context: int,
    examples: Mapping[str, Sequence[Item]] | None = None,
) -> list[list[float]]:
    """`log p(" A" | prompt)` ... of every item.

    A prompt that is too long for the model loses its beginning.

    Args:
        model: of transformers.
        tokenizer: the model's.
        items: the questions.
        batch_size: rows at once.
        context: the model's, in tokens.
        examples: worked examples by subject.
    """
    rows: list[Tokens] = []
    places: list[tuple[int, list[int] | None]] = []  # the item, and its letters' tokens if single
    for number, item in enumerate(items):
        text = prompt(item, (examples or {}).get(item.subject, ()))
        before = list(tokenizer(text)["input_ids"])
        whole = [
            list(tokenizer(f"{text} {letter}")["input_ids"])
            for letter in LETTERS[: len(item.choices)]
        ]
        ends = [ids[len(before) :] for ids in whole]
        if all(len(end) == 1 for end in ends):  # one pass says all: p of each letter's token
            rows.append(_row(before, ends[0], context))
            places.append((number, [end[0] for end in ends]))
            continue
        for end in ends:
            rows.append(_row(before, end, context))
            places.append((number, None))
    letters = sorted({token for _, tokens in places for token in tokens or ()})
    column = {token: i for i, token in enumerate(letters)}

    def measure(logits: Tensor, labels: Tensor) -> Tensor:
        of_label = -cross_entropy(logits, labels)[:, None]
        return torch.cat([of_label, logits.log_softmax(-1)[:, letters]], 1)

    out: list[list[float]] = [[] for _ in items]
    for (number, tokens), likelihood in zip(
        places, per_row(model, rows, batch_size, measure), strict=True
    ):
        if tokens is None:
            out[number].append(float(likelihood[:, 0].sum()))
        else:
            out[number] = [float(likelihood[0, 1 + column[token]]) for token in tokens]
    return out


def _row(before: Sequence[int], end: Sequence[int], context: int) -> Tokens:
    # The last token is predicted and not read: it does not count against the context.
    ids = [*before, *end][-(context + 1) :]
    return {"input_ids": ids, "labels": [IGNORE] * (len(ids) - len(end)) + list(end)}


# --- what came out ---


def accuracy(right: int, rows: int) -> dict[str, Any]:
    """The share that is right, with Wilson's 95% interval."""
    from scipy.stats import binomtest

    interval = binomtest(right, rows).proportion_ci(0.95, method="wilson")
    return {
        "accuracy": right / rows,
        "low": float(interval.low),
        "high": float(interval.high),
        "correct": right,
        "rows": rows,
    }


def scores(items: Sequence[Item], likelihoods: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Accuracy over all items, its mean over subjects, and by subject, with 95% intervals."""
    by_subject: dict[str, list[bool]] = {}
    for item, likelihood in zip(items, likelihoods, strict=True):
        by_subject.setdefault(item.subject, []).append(guess(likelihood) == item.answer)
    each = {
        name: accuracy(sum(hits), len(hits))
        for name, hits in sorted(by_subject.items(), key=lambda pair: natural(pair[0]))
    }
    hits = [hit for part in by_subject.values() for hit in part]
    return {
        **accuracy(sum(hits), len(hits)),
        "subject_mean": sum(x["accuracy"] for x in each.values()) / len(each),
        "by_subject": each,
    }


def guess(likelihoods: Sequence[float]) -> int:
    """The likeliest option, the first of equals."""
    return max(range(len(likelihoods)), key=likelihoods.__getitem__)
