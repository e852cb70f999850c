"""Trains clients on a server's broadcasts, where the base model and the clients' data are.

The same worker serves all clients of a simulation in one process, or one client of a deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedlora.client.cohort import train_cohort
from fedlora.client.local_training import LocalTraining, StepCallback, TrainFunction
from fedlora.client.trainer import train
from fedlora.config.config import Config
from fedlora.data.datasets import ClientData
from fedlora.federation.exchange import Agreement, client_start
from fedlora.federation.messages import Broadcast, ClientState, ClientUpdate
from fedlora.federation.uplink import compressed
from fedlora.lowrank import Adapter, Deltas, LowRank, add_all, prefix, scaling
from fedlora.methods.values import Start
from fedlora.model.base import BaseModel
from fedlora.model.client_rows import MixedRowsError
from fedlora.model.left_as_it_was import left_as_it_was
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.passes import runner_of


def local_training_of(config: Config) -> LocalTraining:
    """The part of a configuration that local training reads."""
    names = set(LocalTraining.__dataclass_fields__) & set(Config.model_fields)
    return LocalTraining(**{name: getattr(config, name) for name in names})


def _plain(key: str, value: Any) -> float | str | None:
    """A metric as JSON can hold it; scalars of torch and numpy become numbers."""
    value = value.item() if hasattr(value, "item") else value
    if value is not None and not isinstance(value, int | float | str):
        raise TypeError(
            f"the local training returned {key} as {type(value).__name__}; metrics are numbers or "
            "text"
        )
    return value


def _tail_norm(adapter: Adapter, tail_from: float) -> float:
    """`sum_modules ||B[:, t:]||_F ||A[t:]||_F`, with `t = tail_from * rank`."""
    tails = ((x, int(tail_from * x.rank)) for x in adapter.values())
    return sum(float(x.B[:, begin:].norm() * x.A[begin:].norm()) for x, begin in tails)


def _with_sent_factors(x: LowRank, factors: str) -> LowRank:
    """An update with the factors that are sent, and zeros for one that stays at the client."""
    a = x.A if "A" in factors else torch.zeros_like(x.A)
    return LowRank(a, x.B if "B" in factors else torch.zeros_like(x.B))


@dataclass(frozen=True)
class _Turn:
    """A client's part in a round.

    Args:
        base: the base that it trains on.
        broadcast: what the server sent it.
        start: what it starts from.
        client_adapter: what it brings into the model.
        training: how it trains.
        data: its rows.
    """

    base: BaseModel
    broadcast: Broadcast
    start: Start
    client_adapter: ClientAdapter
    training: LocalTraining
    data: ClientData


@dataclass(frozen=True)
class Trained:
    """The result of a client's local training in a round.

    Args:
        update: what the client sends back.
        parts: the updates whose sum is added to the base in the client's own model.
    """

    update: ClientUpdate
    parts: tuple[Deltas, ...]

    @property
    def model(self) -> Deltas:
        """The client's model after training, as one update of the base."""
        return add_all(self.parts)


@dataclass(frozen=True)
class Worker:
    """Trains clients on request.

    Args:
        base: the frozen base with adapter layers.
        clients: client number -> its data.
        config: the run's configuration, which says how clients train.
        agreement: of the federation.
        train_function: the local training; the package's own unless a user brings one.
        states: client number -> what outlives a round at it; written to when it has trained.
        other_bases: client number -> its base, of those that hold it in another precision.
    """

    base: BaseModel
    clients: Mapping[int, ClientData]
    config: Config
    agreement: Agreement
    train_function: TrainFunction = train
    states: MutableMapping[int, ClientState] = field(default_factory=dict)
    other_bases: Mapping[int, BaseModel] = field(default_factory=dict)

    def handle(
        self,
        broadcast: Broadcast,
        on_step: Callable[[], StepCallback | None] = lambda: None,
    ) -> ClientUpdate:
        """Train one client from its broadcast; see `handle_together`."""
        return self.handle_together([broadcast], lambda client: on_step())[0].update

    def handle_together(
        self,
        broadcasts: Sequence[Broadcast],
        on_step: Callable[[int], StepCallback | None] = lambda client: None,
    ) -> list[Trained]:
        """Train clients of one round from their broadcasts, in one pass where that is possible.

        Args:
            broadcasts: what the server sent them.
            on_step: gives the callback for a client's steps, if any.

        Returns:
            The clients' updates and models, in the same order; adapters on the CPU in float32 with
            the scale folded.
        """
        turns = [self._turn(broadcast, on_step) for broadcast in broadcasts]
        trained: dict[int, Trained] = {}
        for base in {id(turn.base): turn.base for turn in turns}.values():
            own = [turn for turn in turns if turn.base is base]
            clients = [turn.broadcast.client for turn in own]
            trained |= zip(clients, self._train_together(own), strict=True)
        return [trained[turn.broadcast.client] for turn in turns]

    def _train_together(self, turns: Sequence[_Turn]) -> list[Trained]:
        """Train clients that hold the same base in memory, in one pass where that is possible."""
        if len(turns) == 1:
            return self._train(turns)
        if self.joint and _share_what_is_frozen(turns):
            # No probe has shown that the model mixes the clients' rows, but it may turn out now.
            # They then train one by one, which is possible because a client's training depends on
            # nothing but what it was sent.
            with suppress(MixedRowsError):
                return self._train(turns)
        return [trained for turn in turns for trained in self._train([turn])]

    @property
    def joint(self) -> bool:
        """Whether several clients can train in one pass: not with a user's own training."""
        ours = self.train_function is train and not self.base.tied
        return ours and runner_of(self.base.model).joint

    def _turn(self, broadcast: Broadcast, on_step: Callable[[int], StepCallback | None]) -> _Turn:
        """What one client trains, and how."""
        client, rule_training = broadcast.client, self.agreement.training
        config = self.config.of_client(client)
        start = client_start(broadcast, self.agreement, self.states.get(client))
        client_adapter = ClientAdapter(
            adapter=start.adapter,
            private=start.private,
            scale=scaling(config.alpha(broadcast.rank), broadcast.rank, config.use_rslora),
            dropout=config.lora_dropout,
            trains=rule_training.trained(broadcast.round),
            full_params=broadcast.dense,
        )
        training = replace(
            local_training_of(config),
            client=client,
            round=broadcast.round,
            tail_penalty=rule_training.tail_penalty,
            tail_from=rule_training.tail_from,
            on_step=on_step(client),
        )
        base = self.other_bases.get(client, self.base)
        return _Turn(base, broadcast, start, client_adapter, training, self.clients[client])

    def _train(self, turns: Sequence[_Turn]) -> list[Trained]:
        """Train these clients in one pass.

        Raises:
            MixedRowsError: the model does not keep the rows of several clients apart.
        """
        base = turns[0].base
        frozen = [turns[0].broadcast.base_delta, turns[0].start.shared]
        metrics: Sequence[Mapping[str, Any]]
        if self.train_function is train:
            base.load_clients(frozen, [turn.client_adapter for turn in turns])
            rows, trainings = [turn.data.train for turn in turns], [turn.training for turn in turns]
            metrics = train_cohort(base, rows, trainings)
        else:
            (turn,) = turns
            own = turn.client_adapter
            base.load(
                [*frozen, own.private],
                own.adapter,
                own.scale,
                own.dropout,
                own.full_params,
                own.trains,
            )
            training = replace(turn.training, tokenizer=base.tokenizer)
            with left_as_it_was(base.model):
                metrics = [self.train_function(base.model, turn.data.train, training)]
        return [self._trained(turn, slot, metrics[slot]) for slot, turn in enumerate(turns)]

    def _trained(self, turn: _Turn, slot: int, metrics: Mapping[str, Any]) -> Trained:
        """Read a client's result from its slot, and keep the factors that stay at the client."""
        rule_training, broadcast, start = self.agreement.training, turn.broadcast, turn.start
        adapter, tail_from = turn.base.read_adapter(slot), rule_training.tail_from
        if rule_training.prunes and (
            _tail_norm(adapter, tail_from) < _tail_norm(start.adapter, tail_from)
        ):
            rank = max(1, int(tail_from * broadcast.rank))
            adapter = {name: prefix(x, rank) for name, x in adapter.items()}
        kept = {}
        if rule_training.keeps:
            kept = {f"{name}.B": x.B.contiguous() for name, x in adapter.items()}
        sends = rule_training.sent(broadcast.round)
        update = ClientUpdate(
            client=broadcast.client,
            round=broadcast.round,
            adapter={name: _with_sent_factors(x, sends) for name, x in adapter.items()},
            sends=sends,
            num_examples=len(turn.data.train),
            dense=turn.base.read_full_params(slot),
            metrics={key: _plain(key, value) for key, value in (metrics or {}).items()},
        )
        finite = all(x.A.isfinite().all() and x.B.isfinite().all() for x in adapter.values())
        if finite:  # the server refuses what is not finite, so it is lost
            update, adapter, kept = self._compressed(update, adapter, start, kept)
            if kept:
                self.states[broadcast.client] = ClientState(kept)
        return Trained(update, (broadcast.base_delta, start.shared, start.private, adapter))

    def _compressed(
        self,
        update: ClientUpdate,
        adapter: dict[str, LowRank],
        start: Start,
        kept: dict[str, Tensor],
    ) -> tuple[ClientUpdate, dict[str, LowRank], dict[str, Tensor]]:
        """The update as the server reads it, the adapter with what is sent of it, and what stays.

        Where nothing is compressed all of them are as they were.
        """
        if self.agreement.compression == "none":
            return update, adapter, kept
        state, feedback = self.states.get(update.client), self.config.compression_feedback
        sent = compressed(update, start, state, self.agreement, feedback=feedback)
        sends = update.sends
        as_sent = {
            name: LowRank(
                sent.update.adapter[name].A if "A" in sends else x.A,
                sent.update.adapter[name].B if "B" in sends else x.B,
            )
            for name, x in adapter.items()
        }
        return sent.update, as_sent, {**kept, **sent.lost}


def _share_what_is_frozen(turns: Sequence[_Turn]) -> bool:
    """Whether all clients have the same shared frozen update, which a pass adds to the base once.

    Most rules have none; then each start holds an empty table of its own.
    """
    first = turns[0].start.shared
    return all(t.start.shared is first or not (t.start.shared or first) for t in turns)
