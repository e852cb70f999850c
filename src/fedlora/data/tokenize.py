"""Turns rows into tokens, and marks those that a loss is taken on.

A tokenised row is `{"input_ids": [...], "labels": [...]}`, as transformers' Trainer takes it;
labels are -100 where no loss is taken. A classifier's row is `{"input_ids": [...], "label": id}`,
with `token_type_ids` where the tokenizer has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from fedlora.data.chat_messages import UnusableRowError
from fedlora.data.conversations import conversation
from fedlora.data.rendered import Chat, Classified, Rendered, Turns, learnt_part
from fedlora.data.rows import Row
from fedlora.data.spans import TextSpan, common_prefix, within
from fedlora.data.templates import Template
from fedlora.errors import InputError

Tokens = Mapping[str, Any]
Outcome = Tokens | str
"""What became of a row: its tokens, or why it was dropped."""
IGNORE = -100
"""The label of a token no loss is taken on (PyTorch's and transformers' convention)."""
Encode = Callable[[str], Sequence[int]]
"""Text -> its tokens, those among them that the tokenizer adds by itself (BOS)."""
_BATCH = 500
"""The number of rows whose texts are given to a fast tokenizer in one call."""


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
    encode = _one_by_one(tokenizer)
    return _tokens(rendered, encode, tokenizer, max_length, completion_only, label_names)


def tokenize_all(
    rendered: Sequence[Rendered | str],
    tokenizer: Any,
    max_length: int,
    completion_only: bool,
    label_names: Sequence[str] = (),
    threads: int = 1,
) -> list[Outcome]:
    """Tokenise rows with the result of `tokenize` for each, but many texts in one call.

    Args:
        rendered: rows as `render` gives them; what was dropped there stays dropped.
        tokenizer: of transformers.
        max_length: tokens kept, from the first.
        completion_only: take the loss on the completion, or on all assistant turns, alone.
        label_names: a classifier's labels in the order of their ids.
        threads: how many batches of texts are tokenised at the same time; changes no token.

    Raises:
        InputError: as `tokenize`.
    """

    def outcomes(rows: Sequence[Rendered | str]) -> list[Outcome]:
        encode = _in_one_call(rows, tokenizer, completion_only)
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
    only_texts = all(isinstance(row, tuple | str) for row in rendered)
    if threads < 2 or not only_texts or not _is_fast(tokenizer):
        return list(chain.from_iterable(map(outcomes, batches)))
    # A call sets the tokenizer's truncation and padding. Once the first batch has done so, calls of
    # other threads find them set and only read.
    first = list(chain.from_iterable(map(outcomes, batches[:1])))
    with ThreadPoolExecutor(threads) as pool:
        return first + list(chain.from_iterable(pool.map(outcomes, batches[1:])))


def labels_of(ids: Sequence[int], learnt: Sequence[bool]) -> list[int]:
    """Each token's label: its id where it is learnt, else `IGNORE`. At least one is learnt."""
    first = learnt.index(True)
    if False not in learnt[first:]:  # as in most texts; slices are much faster than a loop
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
    part = learnt_part(row)
    if isinstance(part, Classified):
        return _classified(part, tokenizer, max_length, label_names)
    if isinstance(part, Chat):
        ids, learnt = conversation(part, tokenizer, completion_only)
    elif isinstance(part, Turns):
        ids, learnt = _turns(part, tokenizer, completion_only)
    else:
        ids, learnt = _text(*part, encode, tokenizer.eos_token_id, completion_only)
    return _cut(ids, learnt, max_length)


def _cut(ids: list[int], learnt: list[bool], max_length: int) -> Tokens:
    """A tokenised row of at most so many tokens, the first ones.

    Raises:
        UnusableRowError: none of them is learnt.
    """
    if True not in learnt[1:]:  # no model predicts the first token, whatever stands there
        raise UnusableRowError("no token to learn from")
    ids, learnt = ids[:max_length], learnt[:max_length]
    if True not in learnt[1:]:
        raise UnusableRowError(
            f"cut to max_length {max_length}, it has no token left to learn from"
        )
    return {"input_ids": ids, "labels": labels_of(ids, learnt)}


def _is_fast(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "is_fast", False))


def _one_by_one(tokenizer: Any) -> Encode:
    """An `Encode` that calls the tokenizer for each text."""

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer(text)["input_ids"]
        return ids

    return encode


def _in_one_call(rows: Sequence[Rendered | str], tokenizer: Any, completion_only: bool) -> Encode:
    """An `Encode` for the texts of these rows, made in one call of a fast tokenizer."""
    pairs = [row for row in rows if isinstance(row, tuple)]
    if not pairs or not _is_fast(tokenizer):
        return _one_by_one(tokenizer)
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
    """The tokens of a prompt and its completion with the end-of-text token, and which are learnt.

    The completion begins at the first token in which the whole text differs from the prompt alone;
    the tokenizer may join characters of both to one token.
    """
    ids = list(encode(prompt + completion))
    if not ids or ids[-1] != end:
        ids.append(end)
    masked = common_prefix(encode(prompt), ids) if prompt and completion_only else 0
    return ids, [False] * masked + [True] * (len(ids) - masked)


def _turns(row: Turns, tokenizer: Any, completion_only: bool) -> tuple[list[int], list[bool]]:
    """The tokens of several prompts and completions, and which are learnt.

    The end-of-text token stands behind every completion, and is learnt with it.
    """
    if not _is_fast(tokenizer):
        raise InputError("history needs a fast tokenizer, which knows where a token stands")
    text, spans, end = "", [], str(tokenizer.eos_token)
    for prompt, completion in row.pairs:
        begin = len(text) + len(prompt)
        text += prompt + completion.removesuffix(end) + end
        spans.append(TextSpan(begin, len(text)))
    text = text.removesuffix(end)  # the last one is added as a token below
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
    tokens = {k: list(encoded[k]) for k in ("input_ids", "token_type_ids") if k in encoded}
    if not tokens["input_ids"]:
        raise UnusableRowError("the text is empty")
    return {**tokens, "label": list(label_names).index(row.label)}
