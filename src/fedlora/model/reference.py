"""Gives the untouched base as a model of its own, which shares the base's weights in memory."""

from __future__ import annotations

import copy
from typing import Any

from fedlora.model.lora_layer import AdapterLayer


def reference_model(model: Any) -> Any:
    """The base without adapters and without what lies frozen beside them, ready to be asked.

    DPO and its relatives compare the model that is trained with one that is not. As a `ref_model`
    this one costs no second copy of the weights. Modules that are trained whole
    (`lora_modules_to_save`) are copied as they now are, at the start of the client's round.

    Args:
        model: what a local training is given.

    Returns:
        A model of the same class, in evaluation mode, of which nothing requires gradients.
    """
    shared: dict[int, Any] = {
        id(layer): layer.base for layer in model.modules() if isinstance(layer, AdapterLayer)
    }
    shared |= {id(p): p for p in model.parameters() if not p.requires_grad}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    reference = copy.deepcopy(model, shared)
    return reference.requires_grad_(False).eval()
