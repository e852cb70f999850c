"""A site: a resident base model and the data of one client or several; messages in, messages out.

The same worker serves every client of a simulation in one process, and one client of a deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedlora.adapters import scaling
from fedlora.config import Config
from fedlora.data import ClientData
from fedlora.federation import client_start
from fedlora.lowrank import Adapter, LowRank, prefix
from fedlora.methods import METHODS
from fedlora.methods.rule import Training
from fedlora.model import BaseModel
from fedlora.state import Broadcast, ClientState, ClientUpdate
from fedlora.train import Budget, StepCallback, TrainFunction, train


def budget_of(config: Config) -> Budget:
    """The part of a configuration that local training reads."""
    names = set(Budget.__dataclass_fields__) & set(Config.model_fields)
    return Budget(**{name: getattr(config, name) for name in names})


def _plain(key: str, value: Any) -> float | str | None:
    """A metric as JSON can hold it; scalars of torch and numpy become numbers."""
    value = value.item() if hasattr(value, "item") else value
    if value is not None and not isinstance(value, int | float | str):
        raise TypeError(
            f"the local training returned {key} as {type(value).__name__}; metrics are numbers or "
            "text"
        )
    return value


def _tail(adapter: Adapter, asked: Training) -> float:
    """`sum_modules ||B[:, t:]||_F ||A[t:]||_F`, with `t = tail_from * rank`."""
    tails = ((x, int(asked.tail_from * x.rank)) for x in adapter.values())
    return sum(float(x.B[:, begin:].norm() * x.A[begin:].norm()) for x, begin in tails)


def _only(x: LowRank, factors: str) -> LowRank:
    """The factors that are sent; zeros in the place of one that never leaves the client."""
    a = x.A if "A" in factors else torch.zeros_like(x.A)
    return LowRank(a, x.B if "B" in factors else torch.zeros_like(x.B))


@dataclass(frozen=True)
class Worker:
    """Trains clients on request.

    Args:
        base: the frozen base with adapter layers.
        clients: client number -> its data.
        config: the run's configuration.
        train_function: the local training; the package's own unless a user brings one.
        states: client number -> what outlives a round at it; written to when it has trained.
    """

    base: BaseModel
    clients: Mapping[int, ClientData]
    config: Config
    train_function: TrainFunction = train
    states: MutableMapping[int, ClientState] = field(default_factory=dict)

    def handle(
        self,
        broadcast: Broadcast,
        on_step: Callable[[], StepCallback | None] = lambda: None,
    ) -> ClientUpdate:
        """Train one client from its broadcast.

        Args:
            broadcast: what the server sent it.
            on_step: gives the callback for this client's steps, if any.

        Returns:
            The client's update, its adapter on the CPU in float32 with the scale folded.
        """
        client = broadcast.client
        config = self.config.of_client(client)
        rule = METHODS[config.method]
        options = config.rule_options()
        asked = rule.training(options)
        start = client_start(
            broadcast,
            rule,
            options,
            self.base.targets.shapes,
            config.seed,
            self.states.get(client),
        )
        scale = scaling(config.alpha(broadcast.rank), broadcast.rank, config.use_rslora)
        self.base.load(
            [broadcast.base_delta, start.rest],
            start.adapter,
            scale,
            config.lora_dropout,
            broadcast.dense,
            asked.trained(broadcast.round),
        )
        data = self.clients[client]
        budget = replace(
            budget_of(config),
            client=client,
            round=broadcast.round,
            tail_penalty=asked.tail_penalty,
            tail_from=asked.tail_from,
            on_step=on_step(),
        )
        metrics = self.train_function(self.base.model, data.train, budget)
        adapter = self.base.read_adapter()
        if asked.prunes and _tail(adapter, asked) < _tail(start.adapter, asked):
            rank = max(1, int(asked.tail_from * broadcast.rank))
            adapter = {name: prefix(x, rank) for name, x in adapter.items()}
        finite = all(x.A.isfinite().all() and x.B.isfinite().all() for x in adapter.values())
        if asked.keeps and finite:  # an update that is left out leaves no trace either
            kept = {f"{name}.B": x.B.contiguous() for name, x in adapter.items()}
            self.states[client] = ClientState(kept)
        sends = asked.sent(broadcast.round)
        return ClientUpdate(
            client=client,
            round=broadcast.round,
            adapter={name: _only(x, sends) for name, x in adapter.items()},
            sends=sends,
            num_examples=len(data.train),
            dense=self.base.read_dense(),
            metrics={key: _plain(key, value) for key, value in (metrics or {}).items()},
        )
