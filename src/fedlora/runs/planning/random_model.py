"""Makes a model of random weights in the shape of another, whole or with some of its layers.

No weight is read, so that what a run takes can be measured before its base is downloaded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from fedlora.errors import InputError
from fedlora.model.base import BaseModel, attach
from fedlora.model.targets import find_targets
from fedlora.model.torch_generator import borrowed_generator

LARGEST = 300_000_000
"""Parameters of the largest model that is made to be measured."""


def random_model(
    base: BaseModel,
    device: torch.device,
    *,
    layers: int,
    vocabulary: int | None = None,
    dtype: torch.dtype | None = None,
) -> BaseModel:
    """A model with random weights and adapter layers in the shape of `base`.

    Args:
        base: on the meta device.
        device: to make it on.
        layers: how many of its layers it has.
        vocabulary: how many tokens; None: all.
        dtype: of the frozen weights; None: that of `base`.
    """
    config = copy.deepcopy(base.model.config)
    text = config.get_text_config()
    if layers < number_of_layers(base):
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    if vocabulary is not None:
        text.vocab_size = vocabulary
        text.pad_token_id = config.pad_token_id = 0
    dtype = dtype or next(p.dtype for p in base.model.parameters() if not p.requires_grad)
    kind: Any = type(base.model)
    with borrowed_generator([], 0):
        model = kind._from_config(config, dtype=dtype).to(device)
    ends = sorted({name.rpartition(".")[2] for name in base.targets.shapes})
    to_save = list(base.targets.modules_to_save)
    task = "SEQ_CLS" if classifies(base) else "CAUSAL_LM"
    return attach(
        model, base.tokenizer, find_targets(model, ends, "the model", None, to_save, task)
    )


def number_of_layers(base: BaseModel) -> int:
    """Of the model; 1 where its configuration does not tell."""
    return int(getattr(base.model.config.get_text_config(), "num_hidden_layers", 1))


def layers_to_make(base: BaseModel, largest: int) -> int:
    """How many layers a model of at most so many parameters has.

    Raises:
        InputError: even one layer is too large.
    """
    total = sum(p.numel() for p in base.model.parameters())
    inner, number = inner_parameters(base.model), number_of_layers(base)
    if total <= largest:
        return number
    layers = int((largest - (total - inner)) / (inner / number))
    if layers < 1:
        raise InputError(
            "a calibration would make too large a model of random weights; take the time from "
            "the first rounds instead"
        )
    return min(layers, number)


def classifies(base: BaseModel) -> bool:
    """Whether the model is a sequence classifier."""
    return bool(base.full_params) and type(base.model).__name__.endswith("Classification")


def inner_parameters(model: Any) -> int:
    """Parameters that multiply every token: all but the table of embeddings."""
    embeddings = model.get_input_embeddings()
    looked_up = sum(p.numel() for p in embeddings.parameters()) if embeddings is not None else 0
    head = model.get_output_embeddings()
    tied = head is not None and embeddings is not None and head.weight is embeddings.weight
    total: int = sum(p.numel() for p in model.parameters())
    return total if tied else total - looked_up
