"""Measures how good a model is on held-out rows.

Language models: loss, perplexity, token accuracy, exact match. Classifiers: loss, accuracy, F1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.client.exact_match import exact_matches, guesses_by_turn, turns_of
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.model.passes import runner_of


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Tokens],
    *,
    batch_size: int,
    exact_match: bool = False,
    max_new_tokens: int = 24,
    label_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate on rows: dropout off, generation greedy.

    Args:
        model: a transformers causal language model, or a classifier.
        tokenizer: the model's.
        rows: tokenised, at least one.
        batch_size: rows at once.
        exact_match: also compare the greedy answer to every labelled turn (in a conversation each
            of the assistant's turns, after the true turns before it) with the reference. Only
            answers that the likeliest tokens leave open are generated (`exact_match`).
        max_new_tokens: longest answer generated.
        label_names: a classifier's, in the order of their ids; empty for a language model.

    Returns:
        loss (mean over labelled tokens, in nats), perplexity (`exp(loss)`), token_accuracy (share
        of labelled tokens that are the most likely one), and exact_match (share of turns whose
        generated text equals the reference, white space at the ends aside). For a classifier loss
        (mean over rows) and what `scores` gives.
    """
    model.eval()
    passes = runner_of(model)
    total, count = 0.0, 0
    guesses, truths = [], []
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))  # rows of one length: no padding
    with torch.inference_mode():
        for begin in range(0, len(ordered), batch_size):
            batch = ordered[begin : begin + batch_size]
            for logits, labels in passes.logits_and_labels(model, batch):
                total += float(F.cross_entropy(logits, labels, reduction="sum"))
                count += labels.numel()
                guesses.append(logits.argmax(-1))
                truths.append(labels)
        guess, truth = torch.cat(guesses).cpu(), torch.cat(truths).cpu()
        if label_names:
            return {"loss": total / count, **scores(truth, guess, label_names)}
        out = {
            "loss": total / count,
            "perplexity": math.exp(min(total / count, 700.0)),
            "token_accuracy": int((guess == truth).sum()) / count,
        }
        if exact_match:
            turns = guesses_by_turn(ordered, guess.tolist())
            matches = exact_matches(model, tokenizer, turns, batch_size, max_new_tokens)
            out["exact_match"] = matches / len(turns)
    return out


def scores(truth: Tensor, guess: Tensor, label_names: Sequence[str]) -> dict[str, Any]:
    """How well labels were guessed.

    Args:
        truth, guess: label ids `(n,)`.
        label_names: in the order of their ids.

    Returns:
        accuracy; macro_f1, the mean F1 over the labels that occur in `truth` or `guess` (as
        scikit-learn has it); per_class: label -> precision, recall, f1 (0 where undefined) and
        support, the number of rows that have it.
    """
    classes = len(label_names)
    table = torch.bincount(truth * classes + guess, minlength=classes**2).view(classes, classes)
    correct, actual, predicted = table.diag(), table.sum(1), table.sum(0)  # (classes,) each
    per_class, f1s = {}, []
    for i, name in enumerate(label_names):
        hits, support, guesses = int(correct[i]), int(actual[i]), int(predicted[i])
        f1 = 2 * hits / (support + guesses) if support + guesses else 0.0
        per_class[name] = {
            "precision": hits / guesses if guesses else 0.0,
            "recall": hits / support if support else 0.0,
            "f1": f1,
            "support": support,
        }
        if support + guesses:
            f1s.append(f1)
    return {
        "accuracy": int(correct.sum()) / len(truth),
        "macro_f1": sum(f1s) / len(f1s),
        "per_class": per_class,
    }


def has_prompts(rows: Sequence[Tokens]) -> bool:
    """Whether every row has a prompt to answer: its first token is no label."""
    return all(row["labels"][0] == IGNORE for row in rows)


def references_fit(rows: Sequence[Tokens], max_new_tokens: int) -> bool:
    """Whether every turn has a prompt and a reference of at most `max_new_tokens` tokens."""
    turns = [turns_of(row) for row in rows]
    return bool(rows) and all(
        row and all(turn.prompt and len(turn.reference) <= max_new_tokens for turn in row)
        for row in turns
    )
