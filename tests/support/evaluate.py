"""Makes models to evaluate, and measures their rows one by one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedlora.data.templates import TEMPLATES
from fedlora.data.tokenize import IGNORE, Tokens, tokenize
from fedlora.lowrank import LowRank
from fedlora.model.base import BaseModel
from support.models import load_base
from support.rows import rows


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    """A model with an update loaded, so that it is not merely a random one."""
    made = load_base(str(request.getfixturevalue(request.param)), target_modules="all-linear")
    rng = torch.Generator().manual_seed(4)
    made.load(
        [
            {
                name: LowRank(
                    0.3 * torch.randn(2, n, generator=rng), 0.3 * torch.randn(m, 2, generator=rng)
                )
                for name, (m, n) in made.targets.shapes.items()
            }
        ]
    )
    return made


def data_of(base: BaseModel, completion_only: bool = True) -> list[Tokens]:
    """Rows of different lengths, longest and shortest in the middle."""
    values = rows(9)
    values[4]["prompt"] = "x>"
    values[5]["completion"] *= 4
    template = TEMPLATES["prompt_completion"]
    found = [tokenize(row, template, base.tokenizer, 100, completion_only) for row in values]
    return [row for row in found if row]


def by_row(base: BaseModel, data: Sequence[Tokens]) -> tuple[float, float]:
    """Loss and token accuracy, row by row, with the loss transformers computes from labels."""
    total, right, count = 0.0, 0, 0
    base.model.eval()
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            out = base.model(input_ids=ids, labels=labels)
        places = [i for i in range(1, len(row["labels"])) if row["labels"][i] != IGNORE]
        total += float(out.loss) * len(places)
        right += sum(int(out.logits[0, i - 1].argmax()) == row["labels"][i] for i in places)
        count += len(places)
    return total / count, right / count
