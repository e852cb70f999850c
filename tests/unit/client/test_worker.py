"""A worker trains clients on request, as its configuration and its rule say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.client.local_training import LocalTraining
from fedlora.client.worker import Worker, local_training_of
from fedlora.config.config import Config
from fedlora.data.datasets import ClientData
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.exchange import Agreement
from fedlora.federation.participants import Federation
from fedlora.federation.server import Server, initial_state
from fedlora.methods import METHODS
from fedlora.model.base import BaseModel
from support.models import load_base
from support.packing import rows_of


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> BaseModel:
    """A small model with adapters at q_proj."""
    model: BaseModel = load_base(str(tiny_llama), target_modules=["q_proj"])
    return model


def set_up(base: BaseModel, method: str, **keys: Any) -> tuple[Server, Worker]:
    """Two clients of rank 4."""
    rule = METHODS[method]
    agreement = Agreement(rule, rule.options(), base.targets.shapes)
    federation = Federation([4, 4], [3, 3], agreement)
    server = Server(federation, initial_state(federation), Mean())
    clients = {k: ClientData(rows_of([6, 5, 4], seed=k)) for k in range(2)}
    trainer = keys.pop("train_function", None)
    config = Config(method=method, max_steps=1, per_device_train_batch_size=3, **keys)
    more = {"train_function": trainer} if trainer else {}
    return server, Worker(base, clients, config, agreement, **more)


def test_what_local_training_reads_of_a_configuration() -> None:
    training = local_training_of(Config(max_steps=7, learning_rate=0.5, seed=3))
    assert (training.max_steps, training.learning_rate, training.seed) == (7, 0.5, 3)
    assert training.client == LocalTraining().client


def test_clients_trained_together_end_where_they_end_alone(base: BaseModel) -> None:
    server, worker = set_up(base, "exact")
    assert worker.joint
    sent = list(server.plan().values())
    together = [trained.update for trained in worker.handle_together(sent)]
    for update, broadcast in zip(together, sent, strict=True):
        alone = worker.handle(broadcast)
        assert (update.client, update.num_examples) == (broadcast.client, 3)
        for name, x in update.adapter.items():
            torch.testing.assert_close(x.B, alone.adapter[name].B, rtol=1e-3, atol=1e-6)
        assert server.accept(update) == ""


def test_a_factor_that_stays_with_its_client_is_not_sent_and_trained_on(base: BaseModel) -> None:
    server, worker = set_up(base, "fedsa")
    update = worker.handle(server.plan()[1])
    assert update.sends == "A"
    assert all(not x.B.any() for x in update.adapter.values())
    kept = worker.states[1].factors
    assert kept.keys() == {f"{name}.B" for name in base.targets.shapes}
    assert any(value.any() for value in kept.values())


def test_a_training_of_ones_own(base: BaseModel) -> None:
    seen: list[LocalTraining] = []

    def mine(model: Any, rows: Sequence[Any], training: LocalTraining) -> Mapping[str, Any]:
        seen.append(training)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.fill_(1.0)
        return {"loss": torch.tensor(0.25), "note": "mine"}

    server, worker = set_up(base, "exact", train_function=mine, lora_alpha=8)
    assert not worker.joint
    sent = server.plan()
    updates = [trained.update for trained in worker.handle_together(list(sent.values()))]
    assert [training.client for training in seen] == [0, 1]
    assert updates[0].metrics == {"loss": 0.25, "note": "mine"}
    for x in updates[0].adapter.values():
        assert torch.equal(x.A, torch.ones_like(x.A))
        torch.testing.assert_close(x.B, torch.full_like(x.B, 8 / 4))  # the scale is folded in


def test_metrics_are_numbers_or_text(base: BaseModel) -> None:
    server, worker = set_up(base, "exact", train_function=lambda *_: {"loss": [1.0]})
    with pytest.raises(TypeError, match="the local training returned loss as list; metrics are"):
        worker.handle(server.plan()[0])
