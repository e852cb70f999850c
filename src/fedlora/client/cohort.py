"""Trains several clients in one pass over the frozen base, and decides who trains with whom.

How many clients share a pass is decided once, from what a client's largest micro-batch keeps for
its backward pass and what memory there is (`automatic_size`), and halved when memory runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from fedlora.client.trainer import LocalTraining, Trainee, train_together
from fedlora.data.tokenize import Tokens
from fedlora.model.base import BaseModel

ENOUGH_TOKENS = {"cpu": 2**12, "cuda": 2**16}
"""Tokens of a pass beyond which more clients in it make it no faster."""


def train_cohort(
    base: BaseModel, rows: Sequence[Sequence[Tokens]], budgets: Sequence[LocalTraining]
) -> list[dict[str, Any]]:
    """Train the clients whose adapters a model holds (`BaseModel.load_clients`) together.

    Args:
        base: with as many slots as there are clients.
        rows: each client's tokenised rows.
        budgets: each client's budget.

    Returns:
        Each client's metrics, as `train` gives them.
    """
    trainees = [
        Trainee(base.parameters_of(k), rows[k], budget, base.terms_of(k))
        for k, budget in enumerate(budgets)
    ]
    return train_together(base.model, trainees)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


Asked = TypeVar("Asked")


Answer = TypeVar("Answer")


class Cohorts:
    """How many clients share a pass in a run, and what happens when memory runs out.

    Args:
        size: clients of a pass; halved when memory does not hold them.
        warn: told when it is.
    """

    def __init__(self, size: int, warn: Callable[[str], None]) -> None:
        self.size, self.warn = size, warn

    def train(
        self,
        clients: Sequence[Asked],
        handle: Callable[[Sequence[Asked]], list[Answer]],
        *,
        joint: bool = True,
    ) -> Iterator[Answer]:
        """What `handle` makes of these clients, group by group, in their order.

        Training depends on what a client was sent alone, so a pass that failed can be repeated.

        Args:
            clients: of a round.
            handle: trains a group in one pass, and answers for each of it.
            joint: whether several clients can share a pass; else each has one of its own.
        """
        waiting = clients
        while waiting:
            group = waiting[: self.size if joint else 1]
            try:
                answers = handle(group)
            except Exception as error:
                if not out_of_memory(error) or len(group) == 1:
                    raise
                answers = []
            if not answers:  # outside of `except`, where the failed pass is no longer held
                self.halve(len(group))
                continue
            waiting = waiting[len(group) :]
            yield from answers
            del answers  # not to be held while the next group trains

    def halve(self, number: int) -> None:
        """Let half as many clients share a pass as there was no memory for.

        Args:
            number: of clients in the pass that failed.
        """
        self.size = (number + 1) // 2
        self.warn(f"memory ran out with {number} clients in one pass; going on with {self.size}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
