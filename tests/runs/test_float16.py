"""A base in float16: the gradients of many tokens are those of the same weights in float32."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor

from fedlora.client.cohort import train_cohort
from fedlora.client.local_training import LocalTraining
from fedlora.data.tokenize import Tokens
from fedlora.lowrank import LowRank
from fedlora.model.base import BaseModel, attach
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.targets import find_targets

RATE = 1e3


def base_of(dtype: torch.dtype, vocabulary: int = 500) -> BaseModel:
    """The same weights, representable in float16, in either dtype; a norm is trained whole."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        use_cache=False,
    )
    model = hf.AutoModelForCausalLM.from_config(config).half().to(dtype)
    targets = find_targets(model, "all-linear", "it", None, ["model.norm"], "CAUSAL_LM")
    return attach(model, None, targets)


def change_of(
    base: BaseModel, tokens: int, clients: int, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """What a step changes: the gradient itself, where Adam's epsilon is large. `(clients, n)`

    Args:
        base: the model.
        tokens: labelled ones the loss is said to be a mean over.
        clients: that train together.
        monkeypatch: for that saying.
    """
    source = torch.Generator().manual_seed(1)
    rows: list[list[Tokens]] = []
    for _ in range(clients):
        drawn = [torch.randint(3, 500, (30,), generator=source).tolist() for _ in range(6)]
        rows.append([{"input_ids": ids, "labels": ids} for ids in drawn])
    monkeypatch.setattr("fedlora.client.local_run.count_labelled", lambda rows: tokens)
    adapter = {
        name: LowRank(
            torch.randn(4, n, generator=source) / n**0.5, 0.1 * torch.randn(m, 4, generator=source)
        )
        for name, (m, n) in base.targets.shapes.items()
    }
    client_adapter = ClientAdapter(adapter, scale=2.0, full_params=base.read_full_params())
    training = LocalTraining(
        max_steps=1,
        learning_rate=RATE,
        adam_epsilon=1.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=6,
    )
    base.load_clients([], [client_adapter] * clients)
    train_cohort(base, rows, [training] * clients)
    out = []
    for k in range(clients):
        ended, dense = base.read_adapter(k), base.read_full_params(k)
        parts = [(ended[n].A - x.A).flatten() for n, x in adapter.items()]
        parts += [(ended[n].B - x.B).flatten() for n, x in adapter.items()]
        parts += [(dense[n] - x).flatten() for n, x in client_adapter.full_params.items()]
        out.append(torch.cat(parts) * tokens)
    return torch.stack(out)


@pytest.mark.parametrize("tokens", [180, 2**14, 2**18])
def test_gradients_are_those_of_float32(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    half = change_of(base_of(torch.float16), tokens, 2, monkeypatch)
    wanted = change_of(base_of(torch.float32), tokens, 2, monkeypatch)
    assert float(wanted.norm()) > 1
    assert float((half - wanted).norm()) <= 1e-2 * float(wanted.norm())


def test_what_overflows_is_computed_again_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = change_of(base_of(torch.float16), 2**14, 2, monkeypatch)
    monkeypatch.setattr("fedlora.client.trainer.FLOAT16_SCALE", 2.0**18)
    again = change_of(base_of(torch.float16), 2**14, 2, monkeypatch)
    assert float((again - plain).norm()) <= 1e-2 * float(plain.norm())
    monkeypatch.setattr("fedlora.client.local_run.FLOAT16_LEAST", 2.0**18 + 1)  # it did overflow
    assert not change_of(base_of(torch.float16), 2**14, 2, monkeypatch).isfinite().all()
