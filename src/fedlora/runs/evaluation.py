"""Evaluates the global model and the clients' own models between the rounds of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedlora.client.evaluate import evaluate
from fedlora.data.tokenize import Tokens
from fedlora.federation.messages import ClientState
from fedlora.lowrank import Adapter, Deltas, LowRank
from fedlora.methods.values import ServerState
from fedlora.model.per_model import PerModel
from fedlora.runs.events import Evaluations
from fedlora.runs.run_session import RunSession

_of_base = PerModel[dict[tuple[Any, ...], tuple[Sequence[Tokens], dict[str, Any]]]](
    lambda model: {}
)
"""What the base itself measures, by rows and settings: runs in one process may share a base, and
each of them begins with it. The rows are held, so that no others take their identity."""


def is_base(state: ServerState) -> bool:
    """Whether the state's global model is the base itself: nothing has changed yet."""
    deltas = [*state.base_delta.values(), *state.adapter.values()]
    return not state.dense and not any(
        bool(x.A.any()) and bool(x.B.any()) if isinstance(x, LowRank) else bool(x.W.any())
        for x in deltas
    )


def own_adapter(state: ServerState, kept: ClientState) -> Adapter:
    """A client's adapter, were it to start a round now: the shared factor with its own.

    Args:
        state: of the server.
        kept: what the client keeps; what is missing in it is as in the server's state.
    """
    return {
        name: LowRank(x.A, kept.factors.get(f"{name}.B", x.B))
        for name, x in state.adapter.items()
        if isinstance(x, LowRank)
    }


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models of a run on the base in memory.

    Args:
        session: of the run.
        states: what outlives a round at the clients.
        personal: whether every client has a model of its own and there is no global one.
    """

    session: RunSession
    states: Mapping[int, ClientState]
    personal: bool

    @property
    def possible(self) -> bool:
        """Whether there is anything to evaluate on."""
        session = self.session
        return bool(session.data.eval or session.general or self._held_out())

    def of_server(self, state: ServerState) -> Evaluations:
        """The state's global model on the common rows, on every client's, and on general text.

        Where every client has a model of its own and there is no global one, it is the clients'
        models that are measured, and their mean is given.

        Returns:
            `evaluation`, `client_evaluations` (client -> its rows) and `general_evaluation`, each
            where there are rows for it.
        """
        return self._of_each_client(state) if self.personal else self._of_global_model(state)

    def of_client(self, client: int, model: Deltas, dense: Mapping[str, Tensor]) -> dict[str, Any]:
        """A client's own model, on its own held-out rows or else the common ones.

        Args:
            client: its number.
            model: all that is added to the base.
            dense: its parameters trained whole.
        """
        self.session.base.load([model], full_params=dense)
        return self._measure(self._held_out().get(client) or self.session.data.eval)

    def _held_out(self) -> dict[int, Sequence[Tokens]]:
        """Client -> its own held-out rows, where it has any."""
        return {k: part.eval for k, part in enumerate(self.session.data.clients) if part.eval}

    def _of_global_model(self, state: ServerState) -> Evaluations:
        session, held_out = self.session, self._held_out()
        session.base.load([state.base_delta, state.adapter], full_params=state.dense)
        out = Evaluations()
        if session.data.eval:
            measure = self._measure_base if is_base(state) else self._measure
            out["evaluation"] = measure(session.data.eval)
        if held_out:
            out["client_evaluations"] = {str(k): self._measure(x) for k, x in held_out.items()}
        if session.general:
            out["general_evaluation"] = self._measure(session.general, general=True)
        return out

    def _of_each_client(self, state: ServerState) -> Evaluations:
        """Every client's own model, on its own held-out rows or else the common ones, and on
        general text; the means."""
        session, held_out = self.session, self._held_out()
        by_client, general = dict[int, dict[str, Any]](), list[dict[str, Any]]()
        for client, part in enumerate(session.data.clients):
            rows = held_out.get(client) or session.data.eval
            if not part.train or not (rows or session.general):
                continue
            own = own_adapter(state, self.states.get(client, ClientState()))
            session.base.load([state.base_delta, own], full_params=state.dense)
            if rows:
                by_client[client] = self._measure(rows)
            if session.general:
                general.append(self._measure(session.general, general=True))
        out = Evaluations()
        if by_client:
            out["evaluation"] = _mean(list(by_client.values()))
            out["client_evaluations"] = {str(client): x for client, x in by_client.items()}
        if general:
            out["general_evaluation"] = _mean(general)
        return out

    def _measure_base(self, rows: Sequence[Tokens]) -> dict[str, Any]:
        """The scores of the base itself, which is loaded; measured once."""
        config, known = self.session.config, _of_base(self.session.base.model)
        settings = (
            config.per_device_eval_batch_size,
            config.eval_exact_match,
            config.generation_max_new_tokens,
        )
        key = (id(rows), *settings, self.session.data.label_names)
        if key not in known:
            known[key] = rows, self._measure(rows)
        return dict(known[key][1])

    def _measure(self, rows: Sequence[Tokens], general: bool = False) -> dict[str, Any]:
        """The scores of the model that is loaded; on general text nothing is generated."""
        base, config = self.session.base, self.session.config
        return evaluate(
            base.model,
            base.tokenizer,
            rows,
            batch_size=config.per_device_eval_batch_size,
            exact_match=config.eval_exact_match is True and not general,
            max_new_tokens=config.generation_max_new_tokens,
            label_names=self.session.data.label_names,
        )


def _mean(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over the clients of every score that is a number."""
    names = [name for name, value in scores[0].items() if isinstance(value, float)]
    return {name: sum(x[name] for x in scores) / len(scores) for name in names}
