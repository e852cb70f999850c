"""Which models are evaluated on whose rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlora.federation.messages import ClientState
from fedlora.lowrank import Dense, LowRank
from fedlora.methods.values import ServerState
from fedlora.runs import evaluation
from fedlora.runs.evaluation import Evaluator, own_adapter

X = LowRank(torch.ones(1, 3), torch.zeros(4, 1))


class Base:
    """Remembers what is loaded."""

    def __init__(self) -> None:
        self.model, self.tokenizer, self.loaded = self, None, []  # type: ignore[var-annotated]

    def load(self, frozen: Any, full_params: Any = None) -> None:
        self.loaded = [frozen, full_params]


def evaluator(
    held_out: list[list[Any]],
    common: list[Any],
    general: list[Any],
    personal: bool = False,
    states: dict[int, ClientState] | None = None,
) -> Evaluator:
    """Of clients with these held-out rows."""
    clients = [SimpleNamespace(train=[1], eval=rows) for rows in held_out]
    data = SimpleNamespace(clients=clients, eval=common, label_names=())
    config = SimpleNamespace(
        per_device_eval_batch_size=2, eval_exact_match=True, generation_max_new_tokens=3
    )
    session: Any = SimpleNamespace(base=Base(), data=data, general=general, config=config)
    return Evaluator(session, states or {}, personal)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], bool]]:
    """Rows that were measured, and whether answers were generated; the loss is their sum."""
    calls: list[tuple[list[Any], bool]] = []

    def evaluate(model: Any, tokenizer: Any, rows: list[Any], **how: Any) -> dict[str, Any]:
        calls.append((rows, how["exact_match"]))
        return {"loss": float(sum(rows)), "name": "x"}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    return calls


def test_a_clients_own_factor_with_the_shared_one() -> None:
    state = ServerState(1, {"q": X, "v": X, "dense": Dense(torch.ones(2, 2))})
    own = own_adapter(state, ClientState({"q.B": torch.ones(4, 1)}))
    assert own.keys() == {"q", "v"}
    assert torch.equal(own["q"].B, torch.ones(4, 1))
    assert own["q"].A is X.A
    assert own["v"].B is X.B


def test_the_global_model_on_all_rows_there_are(measured: list[Any]) -> None:
    out = evaluator([[1], [], [2, 3]], [10], [7]).of_server(ServerState(1, {"q": X}))
    assert out["evaluation"]["loss"] == 10
    assert {k: x["loss"] for k, x in out["client_evaluations"].items()} == {"0": 1, "2": 5}
    assert out["general_evaluation"]["loss"] == 7
    assert [exact for _, exact in measured] == [True, True, True, False]


def test_models_of_clients_on_their_own_rows_or_else_the_common_ones() -> None:
    it = evaluator([[1], [], [6]], [2], [], personal=True)
    out = it.of_server(ServerState(1, {"q": X}))
    assert {k: x["loss"] for k, x in out["client_evaluations"].items()} == {"0": 1, "1": 2, "2": 6}
    assert out["evaluation"] == {"loss": 3.0}  # the mean; names have none
    assert it.of_client(1, {}, {})["loss"] == 2


def test_what_there_is_to_evaluate_on() -> None:
    assert not evaluator([[], []], [], []).possible
    assert evaluator([[], [1]], [], []).possible
    assert evaluator([[]], [], [1]).possible
    assert evaluator([[]], [], []).of_server(ServerState(1, {})) == {}


def test_the_base_itself_is_measured_once_for_all_runs_that_begin_with_it(
    measured: list[Any],
) -> None:
    first = evaluator([[]], [10], [])
    lone = Evaluator(first.session, {}, False)
    assert first.of_server(ServerState(0, {"q": X})) == lone.of_server(ServerState(0, {}))
    assert len(measured) == 1
    moved = LowRank(X.A, torch.ones(4, 1))
    for state in (
        ServerState(1, {"q": moved}),
        ServerState(1, {"q": X}, {"q": Dense(torch.ones(4, 3))}),
        ServerState(1, {"q": X}, dense={"score.weight": torch.zeros(2, 3)}),
    ):
        lone.of_server(state)
    assert len(measured) == 4
