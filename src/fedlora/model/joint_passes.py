"""Finds out whether several clients can share a packed pass of a model.

They cannot where the model draws from torch's own generator, because a client's draws would depend
on the other clients, nor where a module's rows cannot be told apart by client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fedlora.data.tokenize import Tokens
from fedlora.model.device import device_of
from fedlora.model.find_rows import find_rows
from fedlora.model.full_modules import full_modules_of
from fedlora.model.lora_layer import AdapterLayer
from fedlora.model.packed_forward import PackedForward
from fedlora.model.torch_generator import borrowed_generator
from fedlora.model.trial_rows import random_rows


def draws_nothing(model: Any, forward: PackedForward, rows: Sequence[Tokens]) -> bool:
    """Whether a training pass leaves torch's own generator alone.

    Args:
        model: left in evaluation mode.
        forward: its packed forward pass.
        rows: to try it on.
    """
    model.train()
    device = device_of(model)
    gpus = [device] if device.type == "cuda" else []
    with borrowed_generator(gpus), forward.client_rows.seeded([0]):
        before = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in gpus)]
        forward.logits(model, rows)
        after = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in gpus)]
    model.eval()
    return all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def locate_rows(
    model: Any, forward: PackedForward, run: Callable[[Sequence[Tokens]], object]
) -> bool:
    """Find out where the clients' rows lie in each module that has to tell clients apart.

    Adapter layers, dropout layers and modules trained whole are told what was found.

    Args:
        model: in the state in which it is to be compared.
        forward: its packed forward pass.
        run: a pass of the model over rows.

    Returns:
        Whether it is known for all of them.
    """
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    training = model.training
    model.eval()
    with forward.client_rows.without_clients(), torch.no_grad():
        others = [*layers, *forward.dropouts]
        draw = partial(random_rows, model, forward.padding, forward.classifier)
        known, layouts = find_rows(draw, full_modules_of(model), others, run)
    model.train(training)
    for layer in layers:
        layer.layouts = layouts[layer]
    forward.dropout_layouts = [layouts[module] for module in forward.dropouts]
    return known
