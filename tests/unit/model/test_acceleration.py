"""What trades time and memory of local training: switched on, or refused with what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.errors import InputError
from fedlora.model.acceleration import accelerate
from support.packing import SIZES, built


def checkpoints(model: Any) -> bool:
    """Whether layers are computed again for the backward pass."""
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_nothing_is_changed_unless_it_is_asked_for() -> None:
    model = built("llama", SIZES)
    accelerate(model)
    assert not checkpoints(model)
    assert not any(m._compiled_call_impl for m in model.modules())


def test_checkpointing_computes_layers_again_with_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        model = built("llama", SIZES).train()
        accelerate(model, gradient_checkpointing=again)
        assert checkpoints(model) is again
        runs = 0

        def count(*_: Any) -> None:
            nonlocal runs
            runs += 1

        model.model.layers[0].mlp.register_forward_pre_hook(count)
        ids = torch.arange(3, 15)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
        assert runs == 1 + again
    torch.testing.assert_close(gradients[0], gradients[1])


def test_what_a_model_cannot_do_is_refused() -> None:
    model = built("llama", SIZES)
    model.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match="gradient_checkpointing: LlamaForCausalLM cannot do it"):
        accelerate(model, gradient_checkpointing=True)


def test_kernels_and_compilers_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama", SIZES)
    with pytest.raises(InputError, match="use_liger_kernel: its kernels need a CUDA device"):
        accelerate(model, use_liger_kernel=True)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="torch_compile: on the CPU it needs a C"):
        accelerate(model, torch_compile=True)
