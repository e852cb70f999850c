"""Measures forgetting: how much worse a tuned model predicts general text than its base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedlora.errors import InputError
from fedlora.rows import ENDINGS, read_rows
from fedlora.tokens import IGNORE, Tokens


def windows(
    tokenizer: Any, path: str | Path, length: int, limit: int | None = None
) -> list[Tokens]:
    """A general text as rows to evaluate on, every token but the first labelled.

    Documents are joined with the end-of-text token between them and cut into windows that do not
    overlap. Where the tokenizer begins a text with a token of its own (BOS), every window does, and
    that is the one without a label.

    Args:
        tokenizer: of transformers.
        path: plain text, or rows (JSON, JSONL, CSV, Parquet) with a column `text`.
        length: tokens of a window; the last one may be shorter.
        limit: windows at most, from the first.

    Raises:
        InputError: the file cannot be read, has no column `text`, or no two tokens.
    """
    begin = _beginning(tokenizer)
    size = length - len(begin)
    if size < 1 or length < 2:
        raise InputError(f"{path}: windows of {length} tokens are too short to predict any")
    wanted = None if limit is None else limit * size
    stream: list[int] = []
    for text in _documents(Path(path), None if wanted is None else 40 * wanted):
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        stream.append(tokenizer.eos_token_id)
        if wanted is not None and len(stream) >= wanted:
            break
    else:
        stream = stream[:-1]
    rows: list[Tokens] = []
    for at in range(0, len(stream), size):
        ids = [*begin, *stream[at : at + size]]
        if len(ids) > 1:
            rows.append({"input_ids": ids, "labels": [IGNORE, *ids[1:]]})
    if not rows:
        raise InputError(f"{path}: holds no text to predict")
    return rows[:limit]


def _beginning(tokenizer: Any) -> list[int]:
    ids = list(tokenizer("a")["input_ids"])
    first = tokenizer.bos_token_id
    return [first] if first is not None and ids[:1] == [first] else []


def _documents(path: Path, letters: int | None) -> Iterator[str]:
    if path.suffix.lower() in ENDINGS:
        rows = read_rows(path)
        if not any(isinstance(row.get("text"), str) for row in rows):
            raise InputError(
                f"{path}: has no column text; it has {', '.join(map(str, rows[0]))}. Name a plain "
                "text file .txt"
            )
        yield from (row["text"] for row in rows if isinstance(row.get("text"), str))
        return
    try:
        with path.open(encoding="utf-8") as file:
            yield file.read() if letters is None else file.read(letters)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; convert the file") from None


@dataclass(frozen=True)
class Losses:
    """Of every window: the summed cross-entropy in nats, and the tokens predicted."""

    sums: Sequence[float]
    counts: Sequence[int]

    @property
    def loss(self) -> float:
        """Mean over all tokens, in nats."""
        return sum(self.sums) / sum(self.counts)

    @property
    def scores(self) -> dict[str, Any]:
        """Loss and perplexity `exp(loss)`."""
        return {
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "tokens": sum(self.counts),
            "windows": len(self.counts),
        }


def measured(model: Any, rows: Sequence[Tokens], batch_size: int) -> Losses:
    """A model's losses on `windows`."""
    from fedlora.assess.likelihood import cross_entropy, per_row

    found = per_row(model, rows, batch_size, cross_entropy)
    return Losses([float(x.to(torch.float64).sum()) for x in found], [len(x) for x in found])


def forgetting(tuned: Losses, base: Losses) -> dict[str, float | None]:
    """How much more a tuned model's tokens cost on general text, in nats per token.

        f = sum_i D_i / sum_i n_i,  D_i = tuned_i - base_i

    over windows i of n_i tokens. The 95% interval is Student's, with the variance of a ratio's
    linearisation, `sum_i (D_i - f n_i)^2 k / (k - 1) / (sum_i n_i)^2` over k windows: both models
    see the same text, so what makes a window hard for both does not widen it.

    Returns:
        forgetting, and forgetting_low and forgetting_high (None with one window).
    """
    from scipy.stats import t

    total, k = sum(base.counts), len(base.counts)
    each = [x - y for x, y in zip(tuned.sums, base.sums, strict=True)]
    value = sum(each) / total
    if k < 2:
        return {"forgetting": value, "forgetting_low": None, "forgetting_high": None}
    residuals = [d - value * n for d, n in zip(each, base.counts, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals) * k / (k - 1)) / total
    half = float(t.ppf(0.975, k - 1)) * error
    return {"forgetting": value, "forgetting_low": value - half, "forgetting_high": value + half}
