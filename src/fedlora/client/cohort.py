"""Trains several clients in one pass over the frozen base, and decides who trains with whom.

How many clients share a pass is decided once, from what a client's largest micro-batch keeps for
its backward pass and the memory there is (`memory.automatic_size`). It is halved when memory runs
out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from fedlora.client.local_run import TrainingJob
from fedlora.client.local_training import LocalTraining
from fedlora.client.trainer import train_together
from fedlora.data.tokenize import Tokens
from fedlora.model.base import BaseModel

ENOUGH_TOKENS = {"cpu": 2**12, "cuda": 2**16}
"""With this many tokens in a pass, more clients in it make training no faster."""


def train_cohort(
    base: BaseModel, rows: Sequence[Sequence[Tokens]], trainings: Sequence[LocalTraining]
) -> list[dict[str, Any]]:
    """Train the clients whose adapters a model holds (`BaseModel.load_clients`) together.

    Args:
        base: with as many slots as there are clients.
        rows: each client's tokenised rows.
        trainings: each client's settings.

    Returns:
        Each client's metrics, as `train` gives them.
    """
    jobs = [
        TrainingJob(base.parameters_of(k), rows[k], training, base.terms_of(k))
        for k, training in enumerate(trainings)
    ]
    return train_together(base.model, jobs)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


ClientT = TypeVar("ClientT")
ResultT = TypeVar("ResultT")


class Cohorts:
    """Divides the clients of a round into passes, and into smaller ones when memory runs out.

    Args:
        size: clients of a pass; halved when memory does not hold them.
        warn: told when it is halved.
    """

    def __init__(self, size: int, warn: Callable[[str], None]) -> None:
        self.size, self.warn = size, warn

    def train(
        self,
        clients: Sequence[ClientT],
        handle: Callable[[Sequence[ClientT]], list[ResultT]],
        *,
        joint: bool = True,
    ) -> Iterator[ResultT]:
        """Train clients group by group, in their order.

        Training depends on what a client was sent alone, so a pass that failed can be repeated.

        Args:
            clients: of a round.
            handle: trains a group in one pass, and gives a result for each client of it.
            joint: whether several clients can share a pass; else each has one of its own.

        Returns:
            An iterator over what `handle` gave, client by client.
        """
        waiting = clients
        while waiting:
            group = waiting[: self.size if joint else 1]
            try:
                results = handle(group)
            except Exception as error:
                if not out_of_memory(error) or len(group) == 1:
                    raise
                results = []
            if not results:  # outside of `except`, where the tensors of the failed pass are freed
                self.halve(len(group))
                continue
            waiting = waiting[len(group) :]
            yield from results
            del results  # frees them before the next group trains

    def halve(self, number: int) -> None:
        """Let half as many clients share a pass as there was no memory for.

        Args:
            number: of clients in the pass that failed.
        """
        self.size = (number + 1) // 2
        self.warn(f"memory ran out with {number} clients in one pass; going on with {self.size}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
