"""Makes tensors of tokenised rows, padded or one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.data.tokenize import IGNORE, Tokens


def count_labelled(rows: Sequence[Tokens]) -> int:
    """How many labelled tokens (never a row's first) or classifier's rows a loss is the mean of."""
    if rows and "label" in rows[0]:
        return len(rows)
    return sum(label != IGNORE for row in rows for label in row["labels"][1:])


def collate(
    rows: Sequence[Tokens], device: torch.device | str = "cpu", pad_token_id: int = 0
) -> dict[str, Tensor]:
    """Rows as right-padded tensors `(batch, longest)`: input_ids, attention_mask, labels.

    A classifier's labels are `(batch,)`; `token_type_ids` go along where rows have them.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filling: int) -> Tensor:
        out = torch.full((len(rows), longest), filling, dtype=torch.long)
        for i, row in enumerate(rows):
            out[i, : len(row[key])] = torch.tensor(row[key])
        return out.to(device)

    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        mask[i, : len(row["input_ids"])] = 1
    batch = {"input_ids": padded("input_ids", pad_token_id), "attention_mask": mask.to(device)}
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded("token_type_ids", 0)
    if "label" in rows[0]:
        batch["labels"] = torch.tensor([row["label"] for row in rows], device=device)
    else:
        batch["labels"] = padded("labels", IGNORE)
    return batch


def flatten_rows(rows: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in one: ids `(tokens,)`, where labelled tokens are predicted `(n,)`, their labels."""
    ids = [token for row in rows for token in row["input_ids"]]
    following = [label for row in rows for label in (*row["labels"][1:], IGNORE)]
    labels = torch.tensor(following)
    predicted_at = (labels != IGNORE).nonzero()[:, 0]
    return torch.tensor(ids).to(device), predicted_at.to(device), labels[predicted_at].to(device)
