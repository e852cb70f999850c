"""Quantises the linear layers of a model that was loaded as its checkpoint holds it.

The checkpoint's weights are read where they lie in their files (transformers maps them into
memory), layer after layer, so that no second copy of the model is ever held. That is also where
the originals are seen whose fingerprint says whether two clients hold the same base, in whichever
precision each of them keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedlora.errors import InputError
from fedlora.model.layers import is_conv1d, is_plain, replace_module
from fedlora.model.quantised_linear import Bits, QuantisedLinear

if TYPE_CHECKING:
    from fedlora.config.config import Config


def bits_of(config: Config) -> Bits | None:
    """In how many bits a configuration wants the base's linear layers; None: as they are."""
    if config.load_in_8bit:
        return 8
    return 4 if config.load_in_4bit else None


def held_in(config: Config) -> str:
    """How the base's linear layers are held, in a word or two: `4 bits`, or the base's dtype."""
    bits = bits_of(config)
    return config.dtype if bits is None else f"{bits} bits"


def saved_quantised(config: Any) -> str:
    """By what a checkpoint's weights were quantised when it was saved; "" where they were not.

    Args:
        config: of the model, of transformers.
    """
    own = getattr(config, "quantization_config", None)
    if not own:
        return ""
    values = own if isinstance(own, Mapping) else vars(own)
    return str(getattr(values.get("quant_method"), "value", values.get("quant_method", "unknown")))


def refuse_saved_quantised(config: Any, name: str, bits: Bits) -> None:
    """Refuse to quantise what was saved quantised.

    Raises:
        InputError: what to give instead.
    """
    if method := saved_quantised(config):
        raise InputError(
            f"load_in_{bits}bit: {name} was saved quantised already ({method}). Give the original "
            f"model, which is quantised when it is loaded, or leave load_in_{bits}bit out"
        )


def note_on_saved_quantised(config: Any, name: str) -> list[str]:
    """What to know of a base that was saved quantised, in a sentence; none of any other."""
    method = saved_quantised(config)
    if not method:
        return []
    return [
        f"model_name_or_path: {name} was saved quantised ({method}), and its original weights are "
        "not there: it is the same base only as the same quantised files, not as the model that "
        "they were made of"
    ]


def quantise(
    model: Any,
    name: str,
    bits: Bits,
    dtype: torch.dtype,
    device: torch.device,
    whole: Sequence[str] = (),
) -> None:
    """Quantise a model's linear layers in place, and hold everything else in `dtype`.

    As in transformers the output head stays as it is, and so do embeddings, norms, expert weights
    that are fused into one tensor, modules that are trained whole, and layers that are more than
    `x W^T + b`.

    Args:
        model: of transformers, as its checkpoint holds it.
        name: of the model, for messages.
        bits: 8 or 4.
        dtype: of what is not quantised.
        device: where each layer is moved to and quantised.
        whole: full names of modules that are trained whole.

    Raises:
        InputError: the model has no layer that can be quantised.
    """
    layers = _quantisable(model, whole)
    if not layers:
        raise InputError(
            f"load_in_{bits}bit: {name} ({type(model).__name__}) has no linear layer that can be "
            "quantised; leave it out"
        )
    for full_name in list(layers):
        layer = layers.pop(full_name)  # the original is let go once it is quantised
        weight = layer.weight.detach().to(device)
        if is_conv1d(layer):
            weight = weight.T
        bias = None if layer.bias is None else layer.bias.detach().to(device)
        quantised = QuantisedLinear(weight, bias, bits, dtype, is_conv1d(layer))
        replace_module(model, full_name, quantised)
    _hold_in(model, dtype, device)


def _quantisable(model: Any, whole: Sequence[str]) -> dict[str, Any]:
    """Full name -> layer."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    shared = _shared_parameters(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module))
        and is_plain(module)
        and module is not head
        and id(module.weight) not in shared
        and not any(name == own or name.startswith(f"{own}.") for own in whole)
    }


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that stand in more than one place."""
    ids = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    seen, twice = set[int](), set[int]()
    for number in ids:
        (twice if number in seen else seen).add(number)
    return twice


def _hold_in(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """All other parameters in this dtype, but for those that the architecture keeps in float32.

    What stays in its dtype is copied too: nothing may go on lying in the checkpoint's file.
    """
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    kept += tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        own = torch.float32 if any(part in parts for part in kept) else dtype
        if not parameter.is_floating_point():
            own = parameter.dtype
        parameter.data = parameter.data.to(device, own, copy=parameter.dtype == own)
    model.to(device)  # buffers
