"""Shows the tokenised data: lengths, and samples token by token with those that are learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any

from rich.console import Console
from rich.text import Text

from fedlora.commands.views.sentences import say
from fedlora.config.config import Config
from fedlora.data.datasets import FederatedData
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.model.batches import count_labelled
from fedlora.runs.checks import dropped_line


def token_lengths(data: FederatedData) -> tuple[list[int], int]:
    """Tokens of every client's rows, ascending, and how many tokens a loss is taken on."""
    rows = [row for part in data.clients for row in (*part.train, *part.eval)]
    learnt = 0 if data.label_names else count_labelled(rows)
    return sorted(len(row["input_ids"]) for row in rows), learnt


def quantiles(lengths: list[int]) -> list[int]:
    """Least, median, 95% and most."""
    last = len(lengths) - 1
    return [lengths[min(last, int(q * len(lengths)))] for q in (0.0, 0.5, 0.95, 1.0)]


def first_samples(data: FederatedData, number: int) -> list[tuple[int, Tokens]]:
    """Every client's first row, every client's second ..., by client."""
    turns = zip_longest(*(part.train for part in data.clients))
    in_turn = ((k, row) for turn in turns for k, row in enumerate(turn) if row is not None)
    return sorted(islice(in_turn, number), key=lambda pair: pair[0])


def show_samples(
    data: FederatedData, tokenizer: Any, config: Config, number: int, console: Console
) -> None:
    """Lengths and losses of the whole data set, and its first samples token by token."""
    for line in _summary(data, config):
        say(console, line)
    if not data.label_names:
        console.print(Text("\n[learnt] tokens stand in brackets, the others are context"))
    console.print()
    for client, row in first_samples(data, number):
        _show_row(row, f"client {client}", data, tokenizer, console)


def _summary(data: FederatedData, config: Config) -> list[str]:
    """Sentences on the data set as a whole."""
    lengths, learnt = token_lengths(data)
    tokens = sum(lengths)
    least, median, nearly_all, most = quantiles(lengths)
    cut = sum(length == config.max_length for length in lengths)
    lines = [
        f"template {data.template}: {len(lengths):,} rows of {len(data.clients)} clients, "
        f"{len(data.eval):,} to evaluate on",
        f"tokens of a row: least {least}, median {median}, 95% {nearly_all}, most {most}; {cut:,} "
        f"reach max_length {config.max_length}",
    ]
    if not data.label_names:
        lines.append(f"a loss is taken on {learnt / tokens:.1%} of {tokens:,} tokens")
    lines += [dropped_line(count, why) for why, count in data.dropped.items()]
    return [*lines, *data.taken, *data.notes]


def _show_row(
    row: Tokens, whose: str, data: FederatedData, tokenizer: Any, console: Console
) -> None:
    """A row token by token, or a classifier's text with its label."""
    length = len(row["input_ids"])
    if data.label_names:
        label = data.label_names[row["label"]]
        console.print(Text(f"{whose}, {length} tokens, label {label}", style="bold"))
        console.print(Text(tokenizer.decode(row["input_ids"])))
    else:
        learnt = [label != IGNORE for label in row["labels"]]
        console.print(Text(f"{whose}, {length} tokens, {sum(learnt)} learnt", style="bold"))
        console.print(tokens_text(row["input_ids"], learnt, tokenizer))
    console.print()


def tokens_text(ids: Sequence[int], learnt: Sequence[bool], tokenizer: Any) -> Text:
    """Tokens as text, learnt ones green and in brackets, so that it reads without colours too."""
    out = Text()
    for i, (piece, learn) in enumerate(token_pieces(ids, learnt, tokenizer)):
        shown = piece.replace("\n", "\\n\n")
        if learn:
            out.append(f"[{shown}]", style="bold green")
        else:
            out.append(shown, style="dim" if i % 2 else "")
    return out


def token_pieces(
    ids: Sequence[int], learnt: Sequence[bool], tokenizer: Any
) -> Iterator[tuple[str, bool]]:
    """The text of one token, or of several that make a character, and whether it is learnt."""
    pending = list[int]()
    for i, (token, learn) in enumerate(zip(ids, learnt, strict=True)):
        pending.append(token)
        piece = _piece(tokenizer, pending)
        if piece.endswith("\ufffd") and len(pending) < 4 and i + 1 < len(ids):
            continue  # a part of a character; it is whole with the tokens that follow
        pending = []
        yield piece, learn


def _piece(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens as it stands within a text: with the space before a word."""
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    if tokens and str(tokens[0]).startswith("\u2581") and not text.startswith(" "):
        text = " " + text  # SentencePiece drops the space of a first word
    return text
