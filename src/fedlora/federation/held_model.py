"""Keeps the global model that a client holds, and brings it up to date by what it is sent.

    broadcast = held.applied(message)      # what `Server.plan` says, to the same bits
    held.confirmation()                    # goes up with the update: is it the server's model?

A message for one client holds what the client lacks (`traffic.lacking`): of most adapters the
factors that travel, and of what everybody keeps only what has changed since the round whose model
the client holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.federation.envelope import Message, RefusedMessageError
from fedlora.federation.exchange import Agreement
from fedlora.federation.increments import appended, laid_out_to_send, merged, sketch
from fedlora.federation.messages import Broadcast, Lacking
from fedlora.federation.site_wire import read_model_message, read_site_message
from fedlora.federation.wire import refusing
from fedlora.lowrank import Adapter, Delta, Deltas, Dense, LowRank
from fedlora.methods.tracking import with_images
from fedlora.methods.values import Increment, Prepared

Factors = dict[str, dict[str, Tensor]]
"""Module -> factor -> tensor."""


class LostModelError(RefusedMessageError):
    """A message rests on a global model that is not the one held; all of it has to be sent."""


@dataclass(frozen=True)
class GlobalModel:
    """A global model in its parts; `base_delta + adapter` is its difference from the base.

    Args:
        adapter: the trainable part.
        base_delta: what was merged into the frozen side.
        dense: the parameters trained whole.
    """

    adapter: Deltas
    base_delta: Deltas
    dense: Mapping[str, Tensor]


class HeldModel:
    """What one client holds of the global model, between rounds and from message to message.

    Args:
        agreement: of the federation.
        round: the round whose model it is, as committed; None: it holds none.
        adapter: of a rule that follows it, all of it; of others what was sent last.
        leading: its leading directions, of a rule that follows them.
        base_delta: what was merged into the frozen side.
    """

    def __init__(
        self,
        agreement: Agreement,
        round: int | None = None,
        adapter: Deltas | None = None,
        leading: Adapter | None = None,
        base_delta: Deltas | None = None,
    ) -> None:
        self.agreement = agreement
        self.round = round
        self.adapter: Deltas = adapter or {}
        self.leading: Adapter = leading or {}
        self.base_delta: Deltas = base_delta or {}

    def applied(self, message: Message) -> Broadcast:
        """The broadcast that a message stands for; the model it rests on is held afterwards.

        The same message may come again: what was applied is not applied twice.

        Args:
            message: `site_wire.site_message`.

        Raises:
            LostModelError: it tells changes of a model that is not held.
            RefusedMessageError: its parts do not fit together.
        """
        asked = read_site_message(message)
        parts, model = self._brought_up_to_date(asked.lacking, message.header.round - 1)
        with refusing():
            if self.agreement.followed:
                rule, options = self.agreement.rule, self.agreement.options
                sent = rule.for_rank(Prepared(model.adapter, model.leading), asked.rank, options)
            else:
                model.adapter = parts.sent_adapter(model.adapter)
                sent = Prepared(model.adapter, parts.sent_leading(model.adapter))
            sent = laid_out_to_send(sent)
        self._hold(model)
        return Broadcast(
            round=message.header.round,
            client=asked.client,
            rank=asked.rank,
            adapter=sent.adapter,
            leading=sent.leading,
            base_delta=model.base_delta,
            dense=parts.dense,
            nbytes=asked.nbytes,
            numbers=asked.numbers,
            modules=asked.modules,
        )

    def evaluated(self, message: Message) -> GlobalModel:
        """The global model that a message stands for, to be evaluated; it is held afterwards.

        Args:
            message: `site_wire.model_message`, whose round is the one that was committed.

        Raises:
            LostModelError: it tells changes of a model that is not held.
            RefusedMessageError: its parts do not fit together.
        """
        parts, model = self._brought_up_to_date(read_model_message(message), message.header.round)
        with refusing():
            adapter = model.adapter if self.agreement.followed else parts.sent_adapter({})
            # A site that has not trained yet has its factors from here, of which rounds send one.
            model.adapter = model.adapter or adapter
        self._hold(model)
        return GlobalModel(adapter, model.base_delta, parts.dense)

    def _brought_up_to_date(self, lacking: Lacking, number: int) -> tuple[_Parts, HeldModel]:
        """The parts of a message, and the model of a round; `self` is not changed."""
        held = lacking.held
        if held is not None and (self.round is None or not held <= self.round <= number):
            here = "none" if self.round is None else f"that of round {self.round}"
            raise LostModelError(
                f"it rests on the global model of round {held}, and here is {here}; "
                "the server has to send all of it"
            )
        with refusing():
            parts = _Parts(lacking, self.agreement)
            old = HeldModel(self.agreement) if held is None else self
            base_delta, adapter, leading = old.base_delta, old.adapter, old.leading
            if held is None or self.round != number:
                # It may hold a later model than the server knows of: that of a round in which it
                # was late. What it has of the rounds since is not applied again.
                after = -1 if old.round is None else old.round
                base_delta = parts.advanced_base(base_delta, after)
                if self.agreement.followed:
                    adapter, leading = parts.advanced_adapter(adapter, leading, after)
        return parts, HeldModel(self.agreement, number, adapter, leading, base_delta)

    def _hold(self, model: HeldModel) -> None:
        self.round, self.base_delta = model.round, model.base_delta
        self.adapter, self.leading = model.adapter, model.leading

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The model as named tensors and a header, for `codec.pack_file`; `unpacked` reads them."""
        groups = {
            "adapter": self.adapter,
            "leading": self.leading,
            "base_delta": self.base_delta,
        }
        tensors = {
            f"{group}/{name}/{factor}": value
            for group, deltas in groups.items()
            for name, x in deltas.items()
            for factor, value in _factors(x).items()
        }
        return tensors, {"round": self.round, "agreement": self.agreement.digest}

    @staticmethod
    def unpacked(
        agreement: Agreement, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
    ) -> HeldModel:
        """The inverse of `packed`; of a model of another agreement nothing is held."""
        if header.get("agreement") != agreement.digest:
            return HeldModel(agreement)
        groups: dict[str, Factors] = {"adapter": {}, "leading": {}, "base_delta": {}}
        for place, value in tensors.items():
            group, rest = place.split("/", 1)
            module, factor = rest.rsplit("/", 1)
            groups[group].setdefault(module, {})[factor] = value
        deltas = {
            group: {name: _delta_of(factors) for name, factors in modules.items()}
            for group, modules in groups.items()
        }
        leading = {name: x for name, x in deltas["leading"].items() if isinstance(x, LowRank)}
        return HeldModel(
            agreement, header["round"], deltas["adapter"], leading, deltas["base_delta"]
        )

    def confirmation(self) -> dict[str, list[float]]:
        """A sketch of what everybody keeps of the global model, for the server to compare."""
        return sketch(self.base_delta, *((self.adapter,) if self.agreement.followed else ()))


def _factors(x: Delta) -> dict[str, Tensor]:
    return {"W": x.W} if isinstance(x, Dense) else {"A": x.A, "B": x.B}


def _delta_of(factors: Mapping[str, Tensor]) -> Delta:
    """The inverse of `_factors`."""
    return Dense(factors["W"]) if "W" in factors else LowRank(factors["A"], factors["B"])


class _Parts:
    """The tensors that a client was sent, by where they belong.

    Args:
        lacking: what it was sent.
        agreement: of the federation.

    Raises:
        ValueError: names or shapes that are not those of the federation.
    """

    def __init__(self, lacking: Lacking, agreement: Agreement) -> None:
        self.agreement = agreement
        self.places = lacking.places
        self.dense: dict[str, Tensor] = {}
        self._groups: dict[str, Factors] = {}
        self._rounds: dict[str, dict[int, Factors]] = {"merge": {}, "increment": {}}
        own = ("whole", "increment") if agreement.followed else ("adapter", "leading", "beyond")
        for place, value in lacking.tensors.items():
            group, rest = place.split("/", 1)
            if group not in ("dense", "merge", "merged", *own):
                raise ValueError(group)
            if group == "dense":
                self.dense[rest] = value
                continue
            if group in self._rounds:
                number, rest = rest.split("/", 1)
                modules = self._rounds[group].setdefault(int(number), {})
            else:
                modules = self._groups.setdefault(group, {})
            module, factor = rest.rsplit("/", 1)
            modules.setdefault(module, {})[factor] = value

    def advanced_base(self, base_delta: Deltas, after: int) -> Deltas:
        """What was merged, brought up to date from the round `after`."""
        for number, factors in sorted(self._rounds["merge"].items()):
            if number > after:
                base_delta = merged(base_delta, self._deltas(factors))
        return {**base_delta, **self._deltas(self._groups.get("merged", {}))}

    def advanced_adapter(
        self, adapter: Deltas, leading: Adapter, after: int
    ) -> tuple[Deltas, Adapter]:
        """An adapter that clients keep and its directions, brought up to date from a round."""
        for number, modules in sorted(self._rounds["increment"].items()):
            if number <= after:
                continue
            increments = {name: self._increment(name, parts) for name, parts in modules.items()}
            adapter, leading = appended(adapter, leading, increments)
        whole, basis = dict[str, Delta](), dict[str, LowRank]()
        for name, factors in self._groups.get("whole", {}).items():
            whole[name] = self._delta(
                name, {factor: value for factor, value in factors.items() if factor != "basis"}
            )
            basis[name] = with_images(whole[name], factors["basis"])
        return {**adapter, **whole}, {**leading, **basis}

    def sent_adapter(self, held: Deltas) -> Deltas:
        """An adapter of which some factors were sent; the others are held, or the seed's."""
        adapter = dict[str, Delta]()
        for name, factors in self._groups.get("adapter", {}).items():
            if len(factors) == 1 and "W" not in factors:
                ((factor, value),) = factors.items()
                other = "A" if factor == "B" else "B"
                beyond = self._groups.get("beyond", {}).get(name, {}).get(other)
                if beyond is not None:
                    factors = {factor: value, other: self._seeded(name, value, other, beyond)}
                else:
                    x, rank = held.get(name), value.shape[0 if factor == "A" else 1]
                    if not isinstance(x, LowRank) or x.rank != rank:
                        raise LostModelError(f"a factor of {name} is not here; send all of it")
                    factors = {factor: value, other: getattr(x, other)}
            adapter[name] = self._delta(name, factors)
        return adapter

    def sent_leading(self, adapter: Deltas) -> Adapter:
        """The leading directions beside an adapter; its own factors where none were sent."""
        own = {name: x for name, x in adapter.items() if isinstance(x, LowRank)}
        beside = self._deltas(self._groups.get("leading", {}))
        return {**own, **{name: x for name, x in beside.items() if isinstance(x, LowRank)}}

    def _seeded(self, name: str, sent: Tensor, factor: str, beyond: Tensor) -> Tensor:
        """A factor as the seed gives it, but for the rows of A or columns of B that were sent.

        Args:
            name: the module.
            sent: its other factor.
            factor: "A" or "B".
            beyond: those rows or columns.
        """
        m, _ = self.agreement.shapes[name]
        indices = torch.tensor(self.places[f"beyond/{name}/{factor}"], dtype=torch.long)
        if factor == "A":
            rows = self.agreement.shared_factors(name, sent.shape[1]).to(sent)
            return rows.index_copy(0, indices, beyond)
        return sent.new_zeros(m, len(sent)).index_copy(1, indices, beyond)

    def _increment(self, name: str, parts: Mapping[str, Tensor]) -> Increment:
        stack = self._delta(name, {"A": parts["A"], "B": parts["B"]})
        assert isinstance(stack, LowRank), "made of factors"
        return Increment(stack, parts["weights"], parts["turn"])

    def _deltas(self, modules: Factors) -> dict[str, Delta]:
        return {name: self._delta(name, factors) for name, factors in modules.items()}

    def _delta(self, name: str, factors: Mapping[str, Tensor]) -> Delta:
        if set(factors) not in ({"A", "B"}, {"W"}):
            raise ValueError(name)
        x = _delta_of(factors)
        if x.shape != tuple(self.agreement.shapes[name]):
            raise ValueError(name)
        return x
