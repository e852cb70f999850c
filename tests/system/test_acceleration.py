"""Options that change how local training is computed, and nothing of what it gives."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fedlora.errors import InputError
from fedlora.model.acceleration import accelerate
from fedlora.model.dtype import resolve_dtype
from support.cohort import (
    RANKS,
    TOGETHER,
    base_of,
    client_adapters_of,
    close,
    rows_of,
    trained,
    trainings_of,
)


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama")
    with pytest.raises(InputError, match="use_liger_kernel: its kernels need a CUDA device"):
        accelerate(base.model, use_liger_kernel=True)
    monkeypatch.setattr(type(base.model), "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match="gradient_checkpointing: LlamaForCausalLM cannot"):
        accelerate(base.model, gradient_checkpointing=True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match="torch_compile: on the CPU it needs a C"):
        accelerate(base.model, torch_compile=True)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_compiled_layers_give_the_same() -> None:
    data = [rows_of("llama", 9, k) for k in range(len(RANKS))]
    trainings = [replace(b, max_steps=3) for b in trainings_of()]
    ends = []
    for compiled in (False, True):
        base = base_of("llama")
        accelerate(base.model, torch_compile=compiled)
        ends.append(trained(base, client_adapters_of(base), data, trainings, TOGETHER))
    close(ends[1], ends[0], 1e-4)


def test_the_dtype_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(width: int) -> Any:
        return LlamaForCausalLM.config_class(hidden_size=width)

    times = {torch.float32: 3.0, torch.bfloat16: 1.0}
    monkeypatch.setattr("fedlora.model.dtype._seconds", lambda width, dtype, rows=0: times[dtype])
    cpu = torch.device("cpu")
    assert resolve_dtype(config(768), cpu) == (
        torch.bfloat16,
        "a layer takes 1/3.0 of the time it takes in float32",
    )
    assert resolve_dtype(config(128), cpu)[0] == torch.float32
    for seconds, said in (
        (3.9, "a layer in bfloat16 takes 1.3 times as long"),
        (6.0, "this CPU takes longer in bfloat16"),
    ):
        times[torch.bfloat16] = seconds
        assert resolve_dtype(config(768), cpu) == (torch.float32, said)
