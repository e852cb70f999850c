"""Answers a server's messages for a site that holds a base model and its clients' data.

The same worker serves every client of a simulation in one process, and one client of a deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedlora.client.cohort import train_cohort
from fedlora.client.trainer import Budget, StepCallback, TrainFunction, train
from fedlora.config.config import Config
from fedlora.data.datasets import ClientData
from fedlora.federation.exchange import client_start, received
from fedlora.federation.messages import Broadcast, ClientState, ClientUpdate
from fedlora.lowrank import Adapter, Deltas, LowRank, add_all, prefix, scaling
from fedlora.methods import METHODS
from fedlora.methods.values import Start, Training
from fedlora.model.base import BaseModel
from fedlora.model.client_rows import MixedRowsError
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.passes import runner_of


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
class _Turn:
    """A client's part in a round."""

    broadcast: Broadcast
    start: Start
    seat: ClientAdapter
    budget: Budget
    data: ClientData
    asked: Training


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
        """Train one client from its broadcast; see `handle_together`."""
        return self.handle_together([broadcast], lambda client: on_step())[0]

    def handle_together(
        self,
        broadcasts: Sequence[Broadcast],
        on_step: Callable[[int], StepCallback | None] = lambda client: None,
    ) -> list[ClientUpdate]:
        """Train clients of one round from their broadcasts, in one pass where that is possible.

        Args:
            broadcasts: what the server sent them.
            on_step: gives the callback for a client's steps, if any.

        Returns:
            The clients' updates, in the same order; adapters on the CPU in float32 with the scale
            folded.
        """
        turns = [self._turn(broadcast, on_step) for broadcast in broadcasts]
        first = turns[0].start.beneath
        # Most rules have nothing beneath; then each start holds an empty table of its own.
        alike = all(t.start.beneath is first or not (t.start.beneath or first) for t in turns)
        if len(turns) > 1 and not (alike and self.joint):
            return [u for b in broadcasts for u in self.handle_together([b], on_step)]
        frozen = [broadcasts[0].base_delta, first]
        budgets, rows = [t.budget for t in turns], [t.data.train for t in turns]
        if self.train_function is train:
            self.base.load_clients(frozen, [t.seat for t in turns])
            try:
                metrics: Sequence[Mapping[str, Any]] = train_cohort(self.base, rows, budgets)
            except MixedRowsError:
                # What no probe has shown. Training depends on what a client was sent alone.
                if len(turns) == 1:
                    raise
                return [u for b in broadcasts for u in self.handle_together([b], on_step)]
        else:
            turn = turns[0]
            seat = turn.seat
            self.base.load(
                [*frozen, seat.private],
                seat.adapter,
                seat.scale,
                seat.dropout,
                seat.full_params,
                seat.trains,
            )
            metrics = [self.train_function(self.base.model, turn.data.train, turn.budget)]
        return [self._update(turn, k, metrics[k]) for k, turn in enumerate(turns)]

    def model_of(self, broadcast: Broadcast, update: ClientUpdate) -> Deltas:
        """The model a client ended its round with: all that is added to the base, the common part
        and its own training together.

        Args:
            broadcast: what it was sent.
            update: what it answered.
        """
        config = self.config.of_client(update.client)
        rule = METHODS[config.method]
        shapes, options = self.base.targets.shapes, config.rule_options()
        state = self.states.get(update.client)
        start = client_start(broadcast, rule, options, shapes, config.seed, state)
        trained = received(update, start)
        return add_all([broadcast.base_delta, start.beneath, start.own, trained])

    @property
    def joint(self) -> bool:
        """Whether several clients can train in one pass: not with a user's own training."""
        ours = self.train_function is train and not self.base.tied
        return ours and runner_of(self.base.model).joint

    def _turn(self, broadcast: Broadcast, on_step: Callable[[int], StepCallback | None]) -> _Turn:
        """What one client trains, and how."""
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
        seat = ClientAdapter(
            adapter=start.adapter,
            private=start.own,
            scale=scaling(config.alpha(broadcast.rank), broadcast.rank, config.use_rslora),
            dropout=config.lora_dropout,
            trains=asked.trained(broadcast.round),
            full_params=broadcast.dense,
        )
        budget = replace(
            budget_of(config),
            client=client,
            round=broadcast.round,
            tail_penalty=asked.tail_penalty,
            tail_from=asked.tail_from,
            on_step=on_step(client),
        )
        return _Turn(broadcast, start, seat, budget, self.clients[client], asked)

    def _update(self, turn: _Turn, place: int, metrics: Mapping[str, Any]) -> ClientUpdate:
        """What the client in a seat sends back."""
        asked, broadcast, client = turn.asked, turn.broadcast, turn.broadcast.client
        adapter = self.base.read_adapter(place)
        if asked.prunes and _tail(adapter, asked) < _tail(turn.start.adapter, asked):
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
            num_examples=len(turn.data.train),
            dense=self.base.read_full_params(place),
            metrics={key: _plain(key, value) for key, value in (metrics or {}).items()},
        )
