"""Evaluates the global model and the clients' own models between the rounds of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.client.evaluate import evaluate
from fedlora.data.tokenize import Tokens
from fedlora.federation.messages import ClientState
from fedlora.lowrank import Adapter, Deltas, LowRank
from fedlora.methods.values import ServerState
from fedlora.runs.session import Session


@dataclass(frozen=True)
class Rating:
    """Evaluates models of a run on the base in memory.

    Args:
        session: of the run.
        states: what outlives a round at the clients.
        personal: whether every client has a model of its own and there is no global one.
    """

    session: Session
    states: Mapping[int, ClientState]
    personal: bool

    @property
    def possible(self) -> bool:
        """Whether there is anything to evaluate on."""
        session = self.session
        return bool(session.data.eval or session.general or self._own_rows())

    def of_server(self, state: ServerState) -> dict[str, Any]:
        """The state's global model on the common rows, on every client's, and on general text.

        Where every client has a model of its own and there is no global one, it is the clients'
        models that are measured, and their mean is given.

        Returns:
            `evaluation`, `client_evaluations` (client -> its rows) and `general_evaluation`, each
            where there are rows for it.
        """
        if self.personal:
            return self._of_each(state)
        base, rows, own = self.session.base, self.session.data.eval, self._own_rows()
        out: dict[str, Any] = {}
        base.load([state.base_delta, state.adapter], full_params=state.dense)
        if rows:
            out["evaluation"] = self._measured(rows)
        if own:
            out["client_evaluations"] = {str(k): self._measured(x) for k, x in own.items()}
        if self.session.general:
            out["general_evaluation"] = self._measured(self.session.general, general=True)
        return out

    def of_client(self, client: int, model: Deltas, dense: Mapping[str, Any]) -> dict[str, Any]:
        """A client's own model, on its own held-out rows or else the common ones.

        Args:
            client: its number.
            model: all that is added to the base.
            dense: its parameters trained whole.
        """
        self.session.base.load([model], full_params=dense)
        return self._measured(self._own_rows().get(client) or self.session.data.eval)

    def own(self, state: ServerState, client: int) -> Adapter:
        """The shared factor with the client's own: its adapter, were it to start a round now."""
        own = self.states.get(client, ClientState()).factors
        adapter = {n: x for n, x in state.adapter.items() if isinstance(x, LowRank)}
        return {n: LowRank(x.A, own.get(f"{n}.B", x.B)) for n, x in adapter.items()}

    def _own_rows(self) -> dict[int, Any]:
        return {k: c.eval for k, c in enumerate(self.session.data.clients) if c.eval}

    def _of_each(self, state: ServerState) -> dict[str, Any]:
        """Every client's own model, on its own held-out rows or else the common ones, and on
        general text; the means."""
        base, own_rows = self.session.base, self._own_rows()
        found, general = dict[int, dict[str, Any]](), list[dict[str, Any]]()
        for client, part in enumerate(self.session.data.clients):
            rows = own_rows.get(client) or self.session.data.eval
            if not part.train or not (rows or self.session.general):
                continue
            base.load([state.base_delta, self.own(state, client)], full_params=state.dense)
            if rows:
                found[client] = self._measured(rows)
            if self.session.general:
                general.append(self._measured(self.session.general, general=True))
        out: dict[str, Any] = {}
        if found:
            out["evaluation"] = _mean(list(found.values()))
            out["client_evaluations"] = {str(client): x for client, x in found.items()}
        if general:
            out["general_evaluation"] = _mean(general)
        return out

    def _measured(self, rows: list[Tokens] | Any, general: bool = False) -> dict[str, Any]:
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


def _mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every score that is a number."""
    scores = [key for key, x in found[0].items() if isinstance(x, float)]
    return {key: sum(x[key] for x in found) / len(found) for key in scores}
