"""How good a model is on held-out rows: loss, perplexity, token accuracy, exact match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fedlora.data import IGNORE, Tokens
from fedlora.train import collate, next_token_loss


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Tokens],
    *,
    batch_size: int,
    exact_match: bool = False,
    max_new_tokens: int = 24,
) -> dict[str, float]:
    """Evaluate on rows: dropout off, generation greedy.

    Args:
        model: a transformers causal language model.
        tokenizer: the model's.
        rows: tokenised, at least one.
        batch_size: rows at once.
        exact_match: also generate an answer to every prompt and compare it with the reference.
        max_new_tokens: longest answer generated.

    Returns:
        loss (mean over labelled tokens, in nats), perplexity (`exp(loss)`), token_accuracy (share
        of labelled tokens that are the most likely one), and exact_match (share of rows whose
        generated text equals the reference, white space at the ends aside).
    """
    device = next(model.parameters()).device
    model.eval()
    total, right, count = 0.0, 0, 0
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))  # rows of one length: no padding
    with torch.inference_mode():
        for at in range(0, len(ordered), batch_size):
            batch = collate(ordered[at : at + batch_size], device)
            loss, logits, labels = next_token_loss(model, batch)
            total += float(loss)
            right += int((logits.argmax(-1) == labels).sum())
            count += labels.numel()
        out = {
            "loss": total / count,
            "perplexity": math.exp(min(total / count, 700.0)),
            "token_accuracy": right / count,
        }
        if exact_match:
            out["exact_match"] = _exact_match(model, tokenizer, rows, batch_size, max_new_tokens)
    return out


def has_prompts(rows: Sequence[Tokens]) -> bool:
    """Whether every row has a prompt to answer: its first token is not learnt."""
    return all(row["labels"][0] == IGNORE for row in rows)


def references_fit(rows: Sequence[Tokens], max_new_tokens: int) -> bool:
    """Whether every row has a prompt and a reference of at most `max_new_tokens` tokens."""
    lengths = [sum(label != IGNORE for label in row["labels"]) for row in rows]
    return bool(rows) and all(
        0 < length <= max_new_tokens and length < len(row["labels"])
        for length, row in zip(lengths, rows, strict=True)
    )


def _exact_match(
    model: Any, tokenizer: Any, rows: Sequence[Tokens], batch_size: int, max_new_tokens: int
) -> float:
    pairs = []
    for row in rows:
        cut = next(i for i, label in enumerate(row["labels"]) if label != IGNORE)
        pairs.append((row["input_ids"][:cut], row["input_ids"][cut:]))
    pairs.sort(key=lambda pair: len(pair[0]))
    right = 0
    for at in range(0, len(pairs), batch_size):
        part = pairs[at : at + batch_size]
        answers = generate(model, tokenizer, [prompt for prompt, _ in part], max_new_tokens)
        for answer, (_, reference) in zip(answers, part, strict=True):
            right += answer == tokenizer.decode(reference, skip_special_tokens=True).strip()
    return right / len(pairs)


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Greedy answers to tokenised prompts, padded on the left as generation needs it."""
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    ends = getattr(model.generation_config, "eos_token_id", None)  # some models have several
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
    )
    texts = tokenizer.batch_decode(out[:, longest:].tolist(), skip_special_tokens=True)
    return [text.strip() for text in texts]
