"""Switches on gradient checkpointing, compiled layers and Liger's kernels for a model."""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import partial
from typing import Any

from torch import nn

from fedlora.errors import InputError
from fedlora.model.client_rows import ClientRows
from fedlora.model.device import device_of
from fedlora.model.lora_layer import AdapterLayer
from fedlora.model.packed_attention import recomputing


def accelerate(
    model: Any,
    *,
    gradient_checkpointing: bool = False,
    torch_compile: bool = False,
    use_liger_kernel: bool = False,
) -> None:
    """Switch these on for a model.

    Args:
        model: of transformers, on the device where it will be trained; changed in place.
        gradient_checkpointing: compute activations again in the backward pass.
        torch_compile: compile the layers of the trunk.
        use_liger_kernel: take the kernels of liger-kernel.

    Raises:
        InputError: what is asked for is not possible here, and what to do.
    """
    if use_liger_kernel:
        _use_liger(model)
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise InputError(
                f"gradient_checkpointing: {type(model).__name__} cannot do it; leave it out, or "
                "use a smaller per_device_train_batch_size"
            )
        # The reentrant kind needs an input that requires gradients, and a frozen base has none.
        of_layers = (m.client_rows for m in model.modules() if isinstance(m, AdapterLayer))
        contexts = partial(recomputing, next(of_layers, ClientRows()))
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    if torch_compile:
        _compile(model)


def _use_liger(model: Any) -> None:
    if device_of(model).type != "cuda":
        raise InputError("use_liger_kernel: its kernels need a CUDA device; leave it out")
    if importlib.util.find_spec("liger_kernel") is None:
        raise InputError(
            "use_liger_kernel: not installed; pip install liger-kernel, or leave it out"
        )
    from transformers.integrations.liger import apply_liger_kernel

    # The output head is ours: on labelled tokens alone, in chunks.
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def _compile(model: Any) -> None:
    """Compile every layer of the trunk by itself, for any number of tokens."""
    on_cpu = device_of(model).type == "cpu"
    if on_cpu and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise InputError(
            "torch_compile: on the CPU it needs a C++ compiler (g++); install one, or leave it out"
        )
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for layer in max(stacks, key=len, default=()):
        layer.compile(dynamic=True)
