"""Makes a client's AdamW, which updates all parameters of one kind as a single vector."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedlora.client.local_training import LocalTraining


class FlatParameters:
    """Holds parameters in one vector and their gradients in another.

    An optimiser's step is then a handful of operations, however many parameters there are. The
    parameters become views of the vector and keep their values.

    Args:
        parameters: of one dtype and device.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.value = torch.cat([p.detach().reshape(-1) for p in parameters])
        self.value.grad = torch.zeros_like(self.value)
        begin = 0
        for p in parameters:
            end = begin + p.numel()
            p.data = self.value[begin:end].view_as(p)
            p.grad = self.value.grad[begin:end].view_as(p)
            begin = end


def make_optimizer(
    parameters: Sequence[tuple[str, torch.nn.Parameter]],
    undecayed: Callable[[str], bool],
    training: LocalTraining,
) -> tuple[list[FlatParameters], torch.optim.Optimizer]:
    """AdamW over one vector for each combination of dtype, device and weight decay.

    Args:
        parameters: what is trained, by name.
        undecayed: whether the parameter of a name has no weight decay.
        training: AdamW's settings.

    Returns:
        The vectors, and the optimiser that steps over them.
    """
    by_kind: dict[Any, list[torch.nn.Parameter]] = {}
    for name, p in parameters:
        by_kind.setdefault((undecayed(name), p.dtype, p.device), []).append(p)
    flats = [FlatParameters(alike) for alike in by_kind.values()]
    groups = [
        {"params": [flat.value], "weight_decay": 0.0 if no_decay else training.weight_decay}
        for (no_decay, *_), flat in zip(by_kind, flats, strict=True)
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )
    return flats, optimizer


_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def undecayed_names(model: Any) -> Callable[[str], bool]:
    """Says of a parameter's name whether it is a bias or belongs to a norm, which do not decay."""
    norms = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm))
    return lambda name: bool(_UNDECAYED.search(name.lower())) or name.startswith(norms)
