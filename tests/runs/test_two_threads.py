"""Two threads train two models at once, and neither notices the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fedlora.client.local_training import LocalTraining
from fedlora.client.trainer import train
from fedlora.lowrank import LowRank
from fedlora.model.base import BaseModel, attach
from fedlora.model.targets import find_targets

ROUNDS = 3


def base_of(kind: str, number: int) -> BaseModel:
    """A tiny model, with attention dropout that the packed pass draws by itself."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(number)
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=60 + number,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                attention_dropout=0.1,
                pad_token_id=0,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=60 + number, n_embd=32, n_layer=2, n_head=2, pad_token_id=0)
        )
    return attach(model, None, find_targets(model, "all-linear", "tiny"))


def ends_of(base: BaseModel, number: int) -> list[bytes]:
    """What a few trainings of one client end with, the examination of the model among them."""
    source = torch.Generator().manual_seed(number)
    rows = []
    for length in (5, 9, 14, 7 + number):
        ids = torch.randint(1, 60, (length,), generator=source).tolist()
        rows.append({"input_ids": ids, "labels": ids})
    adapter = {
        name: LowRank(torch.randn(4, n, generator=source), torch.zeros(m, 4))
        for name, (m, n) in base.targets.shapes.items()
    }
    ends = []
    for round in range(1, ROUNDS + 1):
        base.load([], adapter, scale=2.0, dropout=0.1)
        training = LocalTraining(
            client=number, round=round, max_steps=6, per_device_train_batch_size=2, seed=number
        )
        train(base.model, rows, training)
        adapter = base.read_adapter()
        tensors = {f"{n}.{f}": getattr(x, f) for n, x in adapter.items() for f in "AB"}
        ends.append(save({name: x.contiguous() for name, x in tensors.items()}))
    return ends


def at_once(tasks: list[Callable[[], list[bytes]]]) -> list[list[bytes]]:
    """What these give when they begin together, each in a thread of its own."""
    begin = threading.Barrier(len(tasks))
    results: dict[int, list[bytes]] = {}

    def run(number: int) -> None:
        begin.wait()
        results[number] = tasks[number]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[i] for i in range(len(tasks))]


@pytest.mark.parametrize("kinds", [("llama", "llama"), ("llama", "gpt2")])
def test_two_models_trained_at_once_end_as_each_does_alone(kinds: tuple[str, str]) -> None:
    alone = [ends_of(base_of(kind, i), i) for i, kind in enumerate(kinds)]
    bases = [base_of(kind, i) for i, kind in enumerate(kinds)]
    assert at_once([lambda i=i: ends_of(bases[i], i) for i in range(2)]) == alone  # type: ignore[misc]
