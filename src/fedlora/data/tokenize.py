"""Turns rows into tokens, and marks those that a loss is taken on.

A tokenised row is `{"input_ids": [...], "labels": [...]}`, as transformers' Trainer takes it;
labels are -100 where no loss is taken. A classifier's row is `{"input_ids": [...], "label": id}`,
with `token_type_ids` where the tokenizer has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fedlora.data.chat_messages import UnusableRowError
from fedlora.data.conversations import conversation
from fedlora.data.rendered import Chat, Classified, Rendered, Turns
from fedlora.data.rows import Row
from fedlora.data.spans import common_prefix, within
from fedlora.data.templates import Template
from fedlora.errors import InputError

Tokens = Mapping[str, Any]
Outcome = Tokens | str
"""What became of a row: its tokens, or why it was dropped."""
IGNORE = -100
"""The label of a token no loss is taken on (PyTorch's and transformers' convention)."""
Encode = Callable[[str], Sequence[int]]
"""A text's tokens, with what the tokenizer adds."""
_BATCH = 500
"""Texts of so many rows are given to a fast tokenizer at once."""


def render(row: Row, template: Template) -> Rendered | str:
    """A row as its template reads it, or why it is dropped.

    Raises:
        InputError: the template cannot read it.
    """
    try:
        return template.render(row)
    except UnusableRowError as error:
        return str(error)


def tokenize(
    row: Row,
    template: Template,
    tokenizer: Any,
    max_length: int,
    completion_only: bool,
    label_names: Sequence[str] = (),
) -> Tokens:
    """One row as tokens, cut to `max_length`.

    A text is its prompt, its completion and the end-of-text token; a conversation is what the
    tokenizer's chat template makes of it. Both equal what TRL's SFTTrainer makes of the same row,
    but for tokenizers that add the end-of-text token themselves: TRL has it twice there.

    Args:
        row: what the template reads.
        template: how it reads it.
        tokenizer: of transformers.
        max_length: tokens kept, from the first.
        completion_only: take the loss on the completion, or on all assistant turns, alone.
        label_names: a classifier's labels in the order of their ids.

    Raises:
        UnusableRowError: nothing is left to learn from, or the chat template refuses the row.
        InputError: the tokenizer has no chat template where one is needed; an unknown label.
    """
    rendered = template.render(row)
    return _tokens(rendered, _alone(tokenizer), tokenizer, max_length, completion_only, label_names)


def tokenize_all(
    rendered: Sequence[Rendered | str],
    tokenizer: Any,
    max_length: int,
    completion_only: bool,
    label_names: Sequence[str] = (),
    threads: int = 1,
) -> list[Outcome]:
    """Rows as `tokenize` makes them of each, many texts at a time.

    Args:
        rendered: of `render`; what was dropped there stays dropped.
        tokenizer: of transformers.
        max_length: tokens kept, from the first.
        completion_only: take the loss on the completion, or on all assistant turns, alone.
        label_names: a classifier's labels in the order of their ids.
        threads: batches of texts tokenised beside each other; changes no token.

    Raises:
        InputError: as `tokenize`.
    """

    def outcomes(rows: Sequence[Rendered | str]) -> list[Outcome]:
        encode = _together(rows, tokenizer, completion_only)
        return [outcome(row, encode) for row in rows]

    def outcome(row: Rendered | str, encode: Encode) -> Outcome:
        if isinstance(row, str):
            return row
        try:
            return _tokens(row, encode, tokenizer, max_length, completion_only, label_names)
        except UnusableRowError as error:
            return str(error)

    batches = [rendered[i : i + _BATCH] for i in range(0, len(rendered), _BATCH)]
    # Conversations are rendered in Python, which gains nothing from threads.
    texts = all(isinstance(row, tuple | str) for row in rendered)
    if threads < 2 or not texts or not _is_fast(tokenizer):
        return [made for batch in batches for made in outcomes(batch)]
    # The first batch alone leaves the tokenizer in the state in which the others only read it.
    first = [made for batch in batches[:1] for made in outcomes(batch)]
    with ThreadPoolExecutor(threads) as pool:
        return first + [made for part in pool.map(outcomes, batches[1:]) for made in part]


def labels_of(ids: Sequence[int], learnt: Sequence[bool]) -> list[int]:
    """The tokens that are learnt, `IGNORE` for the others."""
    first = learnt.index(True)
    if False not in learnt[first:]:  # most texts, and much faster
        return [IGNORE] * first + list(ids[first:])
    return [token if learn else IGNORE for token, learn in zip(ids, learnt, strict=True)]


def _tokens(
    row: Rendered,
    encode: Encode,
    tokenizer: Any,
    max_length: int,
    completion_only: bool,
    label_names: Sequence[str],
) -> Tokens:
    """The tokens of a rendered row, by its kind, cut to `max_length`."""
    if isinstance(row, Classified):
        return _classified(row, tokenizer, max_length, label_names)
    if isinstance(row, Chat):
        ids, learnt = conversation(row, tokenizer, completion_only)
    elif isinstance(row, Turns):
        ids, learnt = _turns(row, tokenizer, completion_only)
    else:
        ids, learnt = _text(*row, encode, tokenizer.eos_token_id, completion_only)
    return _cut(ids, learnt, max_length)


def _cut(ids: list[int], learnt: list[bool], max_length: int) -> Tokens:
    if True not in learnt[1:]:  # the first token of a text is predicted from nothing
        raise UnusableRowError("no token to learn from")
    ids, learnt = ids[:max_length], learnt[:max_length]
    if True not in learnt[1:]:
        raise UnusableRowError(
            f"cut to max_length {max_length}, it has no token left to learn from"
        )
    return {"input_ids": ids, "labels": labels_of(ids, learnt)}


def _is_fast(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "is_fast", False))


def _alone(tokenizer: Any) -> Encode:
    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer(text)["input_ids"]
        return ids

    return encode


def _together(rows: Sequence[Rendered | str], tokenizer: Any, completion_only: bool) -> Encode:
    """Tokens of the rows' texts, made in one call where the tokenizer is a fast one."""
    pairs = [row for row in rows if isinstance(row, tuple)]
    if not pairs or not _is_fast(tokenizer):
        return _alone(tokenizer)
    texts = [prompt + completion for prompt, completion in pairs]
    if completion_only:
        texts += [prompt for prompt, _ in pairs if prompt]
    texts = list(dict.fromkeys(texts))
    encoded = tokenizer(texts, return_attention_mask=False)["input_ids"]
    return dict(zip(texts, encoded, strict=True)).__getitem__


def _text(
    prompt: str,
    completion: str,
    encode: Encode,
    end: int,
    completion_only: bool,
) -> tuple[list[int], list[bool]]:
    """A prompt's and its completion's tokens, and the end-of-text token behind them."""
    ids = list(encode(prompt + completion))
    if not ids or ids[-1] != end:
        ids.append(end)
    masked = common_prefix(encode(prompt), ids) if prompt and completion_only else 0
    return ids, [False] * masked + [True] * (len(ids) - masked)


def _turns(row: Turns, tokenizer: Any, completion_only: bool) -> tuple[list[int], list[bool]]:
    """Every completion with the end-of-text token behind it."""
    if not _is_fast(tokenizer):
        raise InputError("history needs a fast tokenizer, which knows where a token stands")
    text, spans, end = "", [], str(tokenizer.eos_token)
    for prompt, completion in row.pairs:
        begin = len(text) + len(prompt)
        text += prompt + completion.removesuffix(end) + end
        spans.append((begin, len(text)))
    text = text.removesuffix(end)  # the last one as behind any text
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, learnt = list(encoded["input_ids"]), within(encoded["offset_mapping"], spans)
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids, learnt = [*ids, tokenizer.eos_token_id], [*learnt, True]
    return ids, [*learnt[:-1], True] if completion_only else [True] * len(ids)


def _classified(
    row: Classified, tokenizer: Any, max_length: int, label_names: Sequence[str]
) -> Tokens:
    """A text's tokens, or a pair's, and the id of its label."""
    encoded = tokenizer(*row.texts, truncation=True, max_length=max_length)
    if row.label not in label_names:
        raise InputError(
            f"label_names: a row has the label {row.label!r}; known are {', '.join(label_names)}"
        )
    kept = {k: list(encoded[k]) for k in ("input_ids", "token_type_ids") if k in encoded}
    if not kept["input_ids"]:
        raise UnusableRowError("the text is empty")
    return {**kept, "label": list(label_names).index(row.label)}
