"""A site: a resident base model and the data of one client or several; messages in, messages out.

The same worker serves every client of a simulation in one process, and one client of a deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedlora.adapters import scaling
from fedlora.config import Config
from fedlora.data import ClientData
from fedlora.federation import client_start
from fedlora.methods import METHODS
from fedlora.model import BaseModel
from fedlora.state import Broadcast, ClientUpdate
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


@dataclass(frozen=True)
class Worker:
    """Trains clients on request.

    Args:
        base: the frozen base with adapter layers.
        clients: client number -> its data.
        config: the run's configuration.
        train_function: the local training; the package's own unless a user brings one.
    """

    base: BaseModel
    clients: Mapping[int, ClientData]
    config: Config
    train_function: TrainFunction = train

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
        start = client_start(
            broadcast, rule, config.rule_options(), self.base.targets.shapes, config.seed
        )
        scale = scaling(config.alpha(broadcast.rank), broadcast.rank, config.use_rslora)
        self.base.load(
            [broadcast.base_delta, start.rest],
            start.adapter,
            scale,
            config.lora_dropout,
            broadcast.dense,
        )
        data = self.clients[client]
        budget = replace(budget_of(config), client=client, round=broadcast.round, on_step=on_step())
        metrics = self.train_function(self.base.model, data.train, budget)
        return ClientUpdate(
            client=client,
            round=broadcast.round,
            adapter=self.base.read_adapter(),
            num_examples=len(data.train),
            dense=self.base.read_dense(),
            metrics={key: _plain(key, value) for key, value in (metrics or {}).items()},
        )
