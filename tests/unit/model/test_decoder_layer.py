"""Which decoder layers are known, and that runs with them and without them agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from fedlora.model.base import BaseModel, attach
from fedlora.model.decoder_layer import decoder_layers
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.passes import runner_of
from fedlora.model.targets import find_targets
from support.client_rows import GROUPED, adapter_of, rows_of

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "window": lambda: MistralConfig(**GROUPED, sliding_window=6),
    "bias": lambda: Qwen2Config(**GROUPED),
}
LENGTHS = ([12, 3, 9], [5, 11])


def base_of(config: Any, targets: str = "all-linear") -> BaseModel:
    """A small model with adapter layers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False
    return attach(model, None, find_targets(model, targets, "m", None, (), "CAUSAL_LM"))


def passed(base: BaseModel, dropout: float) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """Losses, gradients and evaluation's logits of two clients in a pass."""
    adapters = [
        ClientAdapter(adapter_of(base, 2 + k, k), scale=2.0, dropout=dropout) for k in range(2)
    ]
    base.load_clients([], adapters)
    parts = [rows_of(lengths, seed=k) for k, lengths in enumerate(LENGTHS)]
    runner = runner_of(base.model)
    base.model.train()
    losses = runner.backward(base.model, parts, [1.0, 0.5], [3, 4]).losses
    gradients = [p.grad for k in range(2) for _, p in base.parameters_of(k) if p.grad is not None]
    base.model.eval()
    base.load_clients([], adapters[:1])
    with torch.inference_mode():
        logits = [x for x, _ in runner.logits_and_labels(base.model, parts[0])]
    return losses, gradients, logits


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_gradients_and_logits_are_the_models_own(name: str, dropout: float) -> None:
    base = base_of(CONFIGS[name]())
    forward = runner_of(base.model).packed_forward
    layers = forward.decoder_layers
    assert len(layers) == base.model.config.num_hidden_layers
    ours = passed(base, dropout)
    forward.decoder_layers = []
    theirs = passed(base, dropout)
    assert len(ours[1]) == len(theirs[1]) > 0
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    for mine, other in zip((*ours[1], *ours[2]), (*theirs[1], *theirs[2]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_layers_that_do_more_are_left_to_the_model() -> None:
    def known(config: Any, dtype: torch.dtype = torch.float32) -> bool:
        model = AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)
        return bool(decoder_layers(model.model))

    assert known(LlamaConfig(**GROUPED))
    assert not known(LlamaConfig(**GROUPED, attention_dropout=0.1))
    assert not known(LlamaConfig(**GROUPED, hidden_act="gelu"))
    assert not known(LlamaConfig(**GROUPED), torch.bfloat16)
    assert not known(Qwen3Config(**GROUPED))  # norms of queries and keys
    hooked = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED)).requires_grad_(False)
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not decoder_layers(hooked.model)
    trained = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED))
    assert not decoder_layers(trained.model)  # its weights need gradients
