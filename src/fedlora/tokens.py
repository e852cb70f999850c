"""Turns rows into tokens, and marks those that a loss is taken on.

A tokenised row is `{"input_ids": [...], "labels": [...]}`, as transformers' Trainer takes it;
labels are -100 where no loss is taken. A classifier's row is `{"input_ids": [...], "label": id}`,
with `token_type_ids` where the tokenizer has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from fedlora.errors import InputError
from fedlora.rows import Row
from fedlora.templates import Chat, Classified, Rendered, Template, UnusableRowError

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
    tokenizer's chat template makes of it. Both equal what TRL's SFTTrainer makes of the same row.

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
        return [found for batch in batches for found in outcomes(batch)]
    # The first batch alone leaves the tokenizer in the state in which the others only read it.
    first = [found for batch in batches[:1] for found in outcomes(batch)]
    with ThreadPoolExecutor(threads) as pool:
        return first + [found for part in pool.map(outcomes, batches[1:]) for found in part]


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
    if isinstance(row, Classified):
        return _classified(row, tokenizer, max_length, label_names)
    if isinstance(row, Chat):
        ids, learnt = _chat(row, tokenizer, completion_only)
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
    found = tokenizer(texts, return_attention_mask=False)["input_ids"]
    return dict(zip(texts, found, strict=True)).__getitem__


def _text(
    prompt: str,
    completion: str,
    encode: Encode,
    end: int,
    completion_only: bool,
) -> tuple[list[int], list[bool]]:
    ids = list(encode(prompt + completion))
    if not ids or ids[-1] != end:
        ids.append(end)
    masked = _common_prefix(encode(prompt), ids) if prompt and completion_only else 0
    return ids, [False] * masked + [True] * (len(ids) - masked)


def _common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long both begin alike: a completion begins where its prompt alone diverges from it."""
    if one == other[: len(one)]:
        return len(one)
    for i, (x, y) in enumerate(zip(one, other, strict=False)):
        if x != y:
            return i
    return min(len(one), len(other))


def _classified(
    row: Classified, tokenizer: Any, max_length: int, label_names: Sequence[str]
) -> Tokens:
    found = tokenizer(*row.texts, truncation=True, max_length=max_length)
    if row.label not in label_names:
        raise InputError(
            f"label_names: a row has the label {row.label!r}; known are {', '.join(label_names)}"
        )
    kept = {k: list(found[k]) for k in ("input_ids", "token_type_ids") if k in found}
    if not kept["input_ids"]:
        raise UnusableRowError("the text is empty")
    return {**kept, "label": list(label_names).index(row.label)}


# --- conversations ---


def _chat(chat: Chat, tokenizer: Any, assistant_only: bool) -> tuple[list[int], list[bool]]:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "template: chat needs a chat template, and the tokenizer has none; give "
            "chat_template_path: a Jinja file, a tokenizer that has one, or vicuna"
        )
    try:
        if chat.prompt is not None:
            return _conversational_completion(chat, tokenizer, assistant_only)
        if assistant_only and _marks_assistant(tokenizer):
            found = tokenizer.apply_chat_template(
                chat.messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **(chat.extra or {}),
            )
            return list(found["input_ids"]), [bool(x) for x in found["assistant_masks"]]
        return _by_spans(chat, tokenizer, assistant_only)
    except (UnusableRowError, InputError):
        raise
    except ValueError as error:  # transformers': no default among several templates, bad tools
        raise InputError(f"the chat template: {' '.join(str(error).split())}") from None
    except TemplateError as error:
        raise UnusableRowError(
            f"the chat template refuses it: {' '.join(str(error).split())}"
        ) from None


def _marks_assistant(tokenizer: Any) -> bool:
    """Whether the template says itself what the assistant generates (transformers' marker)."""
    template = tokenizer.chat_template
    return isinstance(template, str) and bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))


def _conversational_completion(
    chat: Chat, tokenizer: Any, completion_only: bool
) -> tuple[list[int], list[bool]]:
    def tokens(messages: list[dict[str, Any]], generation: bool) -> list[int]:
        text = _rendered(tokenizer, chat, messages, generation)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ids = tokens(chat.messages, False)
    masked = 0
    if completion_only:
        masked = _common_prefix(tokens(chat.messages[: chat.prompt], True), ids)
    return ids, [i >= masked for i in range(len(ids))]


def _rendered(
    tokenizer: Any, chat: Chat, messages: list[dict[str, Any]], generation: bool = False
) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation, **(chat.extra or {})
        )
    )


def _by_spans(chat: Chat, tokenizer: Any, assistant_only: bool) -> tuple[list[int], list[bool]]:
    """All turns, learnt are the spans of text that the model would have to generate."""
    if not _is_fast(tokenizer):
        raise InputError("template: chat needs a fast tokenizer, which knows where a token stands")
    text = _rendered(tokenizer, chat, chat.messages)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(found["input_ids"])
    if not assistant_only:
        return ids, [True] * len(ids)
    spans = _assistant_spans(chat, tokenizer, text)
    last = spans[-1][1] if spans else 0
    # A template without an end-of-turn token: the model would never learn to stop.
    endless = not text[last:].strip() and not text[:last].endswith(tuple(_specials(tokenizer)))
    if endless and spans:
        spans[-1] = spans[-1][0], len(text)
    learnt = [
        any(begin < hi and (lo <= begin or lo < end) for lo, hi in spans)
        for begin, end in found["offset_mapping"]
    ]
    return ([*ids, tokenizer.eos_token_id], [*learnt, True]) if endless else (ids, learnt)


_MARK = "\ue000\uf8ff\ue001"
"""Characters of Unicode's private use that no text has in a row, and no template looks for."""


def _assistant_spans(chat: Chat, tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where in the rendered conversation the assistant's turns stand.

    A turn begins where the rendered conversation goes on after the prompt for generation. It ends
    with its content, found by rendering once more with a mark behind it, and with the special
    token that ends the turn. So templates that render earlier turns in another way once there are
    later ones (Qwen3's thoughts) are read rightly too.
    """
    spans = []
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant" or not message["content"]:
            continue
        end = _place(tokenizer, chat, text, i, behind=True)
        if end is None:
            raise UnusableRowError("the chat template leaves an assistant turn's text out")
        begin = _begin(tokenizer, chat, text, i)
        alone = _rendered(tokenizer, chat, _marked(chat.messages[: i + 1], i, behind=True))
        end += len(_end_of_turn(text[end:], alone.partition(_MARK)[2], tokenizer))
        if begin < end:
            spans.append((begin, end))
    return spans


def _marked(messages: list[dict[str, Any]], i: int, *, behind: bool) -> list[dict[str, Any]]:
    content = messages[i]["content"]
    content = content + _MARK if behind else _MARK + content
    return [*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]]


def _place(tokenizer: Any, chat: Chat, text: str, i: int, *, behind: bool) -> int | None:
    """Where in the text a turn's content begins or ends; None: the template does not show it."""
    marked = _rendered(tokenizer, chat, _marked(chat.messages, i, behind=behind))
    before, mark, _ = marked.partition(_MARK)
    return _common_prefix(before, text) if mark else None


def _begin(tokenizer: Any, chat: Chat, text: str, i: int) -> int:
    content = _place(tokenizer, chat, text, i, behind=False)
    if i == 0:  # transformers renders no empty conversation
        return content or 0
    prompt = _rendered(tokenizer, chat, chat.messages[:i], True)
    begin = _common_prefix(prompt, text)
    floor = _place(tokenizer, chat, text, i - 1, behind=True)
    if floor is not None and begin < floor:
        # Earlier turns are rendered otherwise without this one: look for the prompt's end itself.
        bare = _rendered(tokenizer, chat, chat.messages[:i])
        added, begin = prompt[_common_prefix(bare, prompt) :], floor
        for length in range(len(added), 0, -1):
            if (at := text.find(added[:length], floor)) >= 0:
                begin = at + length
                break
    # The prompt may end with what the content happens to begin with ("<think>", "<b>").
    return begin if content is None else min(begin, content)


@lru_cache(maxsize=4)
def _specials(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token) for token in added.values() if token.special}
    return sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)


def _end_of_turn(after: str, alone: str, tokenizer: Any) -> str:
    """The special tokens that end a turn, or nothing.

    Several in a row (Cohere's) where they also stand behind the turn when it is the last;
    otherwise the one that follows at once, or the plain text that always ends a turn.
    """
    special = "(?:" + "|".join(map(re.escape, _specials(tokenizer))) + ")"
    found = re.match(rf"\s*{special}+", after[: _common_prefix(alone, after)])
    found = found or re.match(rf"\s*{special}", after)
    if found:
        return found.group()
    plain = alone.rstrip()  # a mark that is no token of its own
    return plain if plain and after.startswith(plain) else ""
