"""A training step is timed on random weights."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.errors import InputError
from fedlora.model.base import BaseModel, attach
from fedlora.model.client_rows import MixedRowsError
from fedlora.model.targets import find_targets
from fedlora.runs.planning import trial_training
from fedlora.runs.planning.fastest_way import Way
from fedlora.runs.planning.random_model import number_of_layers
from fedlora.runs.planning.trial_training import TrialClient, TrialTraining, spread
from support.models import LLAMA


def shapes_alone(**changes: int) -> BaseModel:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))
    return attach(model, None, find_targets(model, "all-linear", "it", None, [], "CAUSAL_LM"))


def client(rank: int, tokens: int = 8) -> TrialClient:
    ids = list(range(50, 50 + tokens))
    return TrialClient(rank, [{"input_ids": ids, "labels": ids}])


def test_a_pass_has_clients_of_all_kinds() -> None:
    clients = [client(rank) for rank in (64, 4, 16, 8)]
    assert [x.rank for x in spread(clients, 1)] == [16]
    assert [x.rank for x in spread(clients, 2)] == [8, 64]
    assert [x.rank for x in spread(clients, 4)] == [4, 8, 16, 64]
    assert [x.rank for x in spread(clients, 8)] == [4, 4, 8, 8, 16, 16, 64, 64]


def test_steps_of_one_client_and_of_several() -> None:
    before = torch.get_num_threads()
    trial = TrialTraining(shapes_alone(), [client(4), client(2)], merged_rank=6)
    for clients in (1, 2):
        assert 0 < trial.seconds(Way("float32", 1, 0, clients)) < math.inf
    assert torch.get_num_threads() == before


def test_of_a_large_model_a_part_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    base = shapes_alone(num_hidden_layers=6)
    assert TrialTraining(base, [client(2)]).vocabulary is None
    monkeypatch.setattr(trial_training, "QUICK", 1e5)
    trial = TrialTraining(base, [client(2, tokens=3)])
    assert (trial.layers, number_of_layers(base)) == (2, 6)
    assert trial.vocabulary == max(64, math.ceil(LLAMA["vocab_size"] / 3))
    assert max(trial.clients[0].rows[0]["input_ids"]) < trial.vocabulary
    assert trial.seconds(Way("float32", 1, 0, 1)) > 0
    monkeypatch.setattr(trial_training, "QUICK", 10.0)
    with pytest.raises(InputError, match="takes too long to be tried"):
        TrialTraining(base, [client(2)])


def test_a_process_whose_step_fails_tells_nothing() -> None:
    """An architecture whose clients cannot share a pass is no error that a user has to read."""
    told: list[float] = []

    def step() -> float:
        raise MixedRowsError

    before = torch.get_num_threads()
    try:
        answer = SimpleNamespace(send=told.append)
        trial_training._take_steps(step, SimpleNamespace(wait=print), answer, 1.0)
    finally:
        torch.set_num_threads(before)
    assert told == []
