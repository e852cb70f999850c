"""Times real training steps of a run's own clients, on random weights of its model's shape.

A step is forward pass, backward pass, clipping and AdamW, as a run takes it (`train_cohort`). Of a
model that is too large for a quick step every so many layers are made, with as large a part of its
vocabulary: the products of a pass then have the shares of the time that they have in the whole.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from threading import BrokenBarrierError
from typing import Any

import torch

from fedlora.client.cohort import train_cohort
from fedlora.client.local_training import LocalTraining
from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.lowrank import Deltas, LowRank
from fedlora.model.acceleration import accelerate
from fedlora.model.base import BaseModel
from fedlora.model.client_rows import MixedRowsError
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.passes import runner_of
from fedlora.runs.planning.fastest_way import Way
from fedlora.runs.planning.random_model import (
    LARGEST,
    classifies,
    inner_parameters,
    layers_to_make,
    number_of_layers,
    random_model,
)
from fedlora.seeds import Purpose, fresh_factors

QUICK = 20e9
"""Operations of a client's step that is quick enough to be timed a few times."""
FEWEST_LAYERS = 2
"""The last layer computes less than the others, so one alone says too little."""
PATIENCE = 3.0
"""Seconds in which worker processes have to make their step."""


@dataclass(frozen=True)
class TrialClient:
    """A client as it is timed.

    Args:
        rank: of its adapter.
        rows: a micro-batch of usual length.
    """

    rank: int
    rows: Sequence[Tokens]

    @property
    def tokens(self) -> int:
        """Of the micro-batch."""
        return sum(len(row["input_ids"]) for row in self.rows)


def spread(clients: Sequence[TrialClient], number: int) -> list[TrialClient]:
    """So many of the clients, evenly from the one with the least to the one with the most."""
    ordered = sorted(clients, key=lambda client: (client.tokens * client.rank, client.tokens))
    return [ordered[int((k + 0.5) * len(ordered) / number)] for k in range(number)]


class TrialTraining:
    """Trains clients for a step in the ways that are asked for.

    Args:
        base: the run's, on the meta device.
        clients: those of a round.
        merged_rank: rank of what lies frozen beside the base after a round; 0: nothing does.
        gradient_checkpointing: recompute activations.

    Raises:
        InputError: the model is too large to be made for this.
    """

    def __init__(
        self,
        base: BaseModel,
        clients: Sequence[TrialClient],
        merged_rank: int = 0,
        *,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.base, self.merged_rank = base, merged_rank
        self.checkpointing = gradient_checkpointing
        tokens = sum(client.tokens for client in clients) / len(clients)
        self.layers = _quick_layers(base, tokens)
        self.vocabulary = None
        if self.layers < number_of_layers(base) and not classifies(base):
            whole = base.model.get_input_embeddings().num_embeddings
            self.vocabulary = max(64, math.ceil(whole * self.layers / number_of_layers(base)))
        self.clients = [replace(x, rows=_within(x.rows, self.vocabulary)) for x in clients]
        self._models: dict[str, tuple[BaseModel, Deltas]] = {}
        self._warm = set[tuple[str, int]]()

    def prepare(self, dtype: str) -> None:
        """Make the model in a dtype, which takes longer than a step."""
        self._model(dtype)

    def seconds(self, way: Way) -> float:
        """Seconds of one client's step; before the first of its kind one is taken to warm up."""
        if way.workers:
            self.prepare(way.dtype)  # once, before processes are forked
            return beside_each_other(lambda: self._step(way), way.workers, PATIENCE)
        kind = way.dtype, way.threads
        with _threads(way.threads), suppress(MixedRowsError, MemoryError):
            if kind not in self._warm:
                self._warm.add(kind)
                self._step(way)
            return self._step(way)
        return math.inf

    def work(self, client: TrialClient) -> float:
        """What a step of a client costs, but for a factor that is the same for all."""
        made, _ = next(iter(self._models.values()))
        per_rank = sum(m + n for m, n in made.targets.shapes.values())
        return client.tokens * (inner_parameters(made.model) + 1.5 * client.rank * per_rank)

    def _step(self, way: Way) -> float:
        """Take a step; its seconds by client, as if all of the round's clients had taken it."""
        base, frozen = self._model(way.dtype)
        together = spread(self.clients, way.clients)
        base.load_clients([frozen] if frozen else [], [_adapter(base, x) for x in together])
        trainings = [
            LocalTraining(client=k, per_device_train_batch_size=len(x.rows), max_steps=1)
            for k, x in enumerate(together)
        ]
        done = train_cohort(base, [x.rows for x in together], trainings)
        seconds: float = sum(metrics["seconds"] for metrics in done)
        base.load_clients([frozen] if frozen else [], [])
        usual = sum(map(self.work, self.clients)) / len(self.clients)
        return seconds / sum(map(self.work, together)) * usual

    def _model(self, dtype: str) -> tuple[BaseModel, Deltas]:
        """The model in a dtype, with what lies frozen beside it."""
        if dtype not in self._models:
            made = random_model(
                self.base,
                torch.device("cpu"),
                layers=self.layers,
                vocabulary=self.vocabulary,
                dtype=getattr(torch, dtype),
            )
            accelerate(made.model, gradient_checkpointing=self.checkpointing)
            runner_of(made.model)  # looks at the architecture once, which is no part of a step
            self._models[dtype] = made, _frozen(made, self.merged_rank)
        return self._models[dtype]


def _quick_layers(base: BaseModel, tokens: float) -> int:
    """How many layers make a step of so many tokens quick."""
    number, inner = number_of_layers(base), inner_parameters(base.model)
    quick = int(number * QUICK / (4 * inner * max(tokens, 1)))
    most = layers_to_make(base, LARGEST)
    layers = min(number, most, max(FEWEST_LAYERS, quick))
    if layers < min(FEWEST_LAYERS, number) or 4 * inner * layers / number * tokens > 5 * QUICK:
        raise InputError("a step of this model takes too long to be tried")
    return layers


def _within(rows: Sequence[Tokens], vocabulary: int | None) -> Sequence[Tokens]:
    """Rows whose tokens exist in a smaller vocabulary."""
    if vocabulary is None:
        return rows
    return [
        {
            **row,
            "input_ids": [token % vocabulary for token in row["input_ids"]],
            "labels": [x % vocabulary if x >= 0 else x for x in row["labels"]],
        }
        for row in rows
    ]


def _adapter(base: BaseModel, client: TrialClient) -> ClientAdapter:
    shapes = base.targets.shapes
    draw = fresh_factors(0, 0, client.rank, Purpose.CLIENT_INIT, shapes)
    factors = {
        name: LowRank(draw(name, client.rank), torch.zeros(m, client.rank))
        for name, (m, _) in shapes.items()
    }
    return ClientAdapter(factors, full_params=base.read_full_params())


def _frozen(base: BaseModel, rank: int) -> Deltas:
    """A small update of the base of this rank at most."""
    if not rank:
        return {}
    shapes = base.targets.shapes
    draw = fresh_factors(0, 0, 0, Purpose.CLIENT_INIT, shapes)
    ranks = {name: min(rank, *shape) for name, shape in shapes.items()}
    return {
        name: LowRank(draw(name, ranks[name]), torch.full((m, ranks[name]), 1e-6))
        for name, (m, _) in shapes.items()
    }


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- several processes ---


def beside_each_other(step: Any, number: int, patience: float) -> float:
    """Seconds of a step that so many processes of one thread take at the same time.

    Args:
        step: takes a step and returns its seconds; it is called in forked processes.
        number: of processes.
        patience: seconds in which all of them have to be done.

    Returns:
        The mean; infinite where a process fails or is not done in time.
    """
    context = multiprocessing.get_context("fork")
    barrier, processes, ends = context.Barrier(number), [], []
    gc.collect()
    try:
        for _ in range(number):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_take_steps, args=(step, barrier, theirs, patience), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        until, seconds = time.monotonic() + patience, []
        for end in ends:
            if not end.poll(max(0.0, until - time.monotonic())):
                return math.inf
            seconds.append(float(end.recv()))
        return sum(seconds) / number
    except (OSError, EOFError):
        return math.inf
    finally:
        for process, end in zip(processes, ends, strict=False):
            end.close()
            process.kill()
            process.join()


def _take_steps(step: Any, barrier: Any, answer: Connection, patience: float) -> None:
    """In a process of its own: warm up, wait for the others, take a step, tell its seconds.

    A process that fails says nothing, and its end tells `beside_each_other`; multiprocessing would
    print a trace into the user's terminal.
    """
    torch.set_num_threads(1)
    with suppress(Exception):
        step()
        barrier.wait(patience)
        seconds = step()
        answer.send(seconds)
        with suppress(BrokenBarrierError):
            barrier.wait(patience)  # whoever is done first does not leave the others a free core
