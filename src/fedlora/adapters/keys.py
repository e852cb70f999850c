"""Tells what a key of a PEFT state dict names, however the model was wrapped when it was saved.

`torch.compile`, DDP, FSDP, checkpointing and trainers put parts of their own into names, and a
state dict that was saved raw has the adapter's name in them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fedlora.errors import InputError

PREFIX = "base_model.model."
_WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",  # FSDP of PyTorch 1
    "_checkpoint_wrapped_module",
    "_forward_module",
)
_LORA = re.compile(
    r"^(.+)\.lora_(?P<part>[A-Za-z_]+)(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?"
    r"(?:\.(?P<end>weight|bias))?$"
)
_COPY, _ORIGINAL, _BASE = ".modules_to_save.", ".original_module.", ".base_layer."


@dataclass(frozen=True)
class Key:
    """What a key names.

    Args:
        kind: `lora` (a factor), `whole` (a trained copy), `original` (what it is a copy of), `base`
            (a weight under a LoRA layer), `plain` (any other parameter).
        name: of the module for `lora`, else of the parameter, as in the model without PEFT.
        part: of a factor: `A`, `B`, `E`, `embedding_A` ...
        adapter: the adapter's name, where the key says it.
    """

    kind: str
    name: str
    part: str = ""
    adapter: str | None = None


def unwrapped(key: str) -> str:
    """A key without the parts that wrappers around the model or the PEFT model put in it, and
    without PEFT's own prefix."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    ends = [i + 2 for i in range(len(parts) - 2) if parts[i : i + 2] == ["base_model", "model"]]
    parts = parts[ends[-1] :] if ends else parts
    while len(parts) > 2 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def read_keys(keys: Iterable[str]) -> dict[str, Key]:
    """Every key of a state dict and what it names.

    Raises:
        InputError: the keys are of several adapters.
    """
    names = {key: unwrapped(key) for key in keys}
    out = {}
    for key, name in names.items():
        if match := _LORA.match(name):
            part = match["part"] if match["end"] != "bias" else f"{match['part']}.bias"
            out[key] = Key("lora", match[1], part, match["adapter"])
        elif _BASE in f".{name}":
            out[key] = Key("base", name.replace(_BASE.lstrip("."), "", 1))
        elif _ORIGINAL in f".{name}":
            out[key] = Key("original", name.replace(_ORIGINAL.lstrip("."), "", 1))
        elif _COPY not in f".{name}":
            out[key] = Key("plain", name)
    adapters = {key.adapter for key in out.values() if key.kind == "lora"} - {None}
    originals = {key.name for key in out.values() if key.kind == "original"}
    # Whether a trained copy's key names the adapter too is seen from the other keys.
    for key, name in names.items():
        if key not in out:
            out[key] = _copy(name, adapters, originals)
    several = sorted({key.adapter for key in out.values() if key.adapter is not None})
    if len(several) > 1:
        raise InputError(
            f"its weights hold several adapters ({', '.join(several)}); save one of them alone: "
            "model.save_pretrained(directory, selected_adapters=[name])"
        )
    return {key: out[key] for key in names}


def _copy(name: str, adapters: Collection[str | None], originals: Collection[str]) -> Key:
    """A trained copy of a module, `x.modules_to_save.y.weight`.

    PEFT writes the adapter's name as y where a state dict is saved raw. Else y may be a module
    inside of x: it is one if the key of the original says so, or if nothing names an adapter.
    """
    owner, _, inside = f".{name}".rpartition(_COPY)
    owner = owner.lstrip(".")
    first, _, rest = inside.partition(".")
    with_first, without_first = f"{owner}.{inside}".lstrip("."), f"{owner}.{rest}".lstrip(".")
    nothing_follows = not rest
    no_adapter = first != "default" and not adapters and f"{owner}.{rest}" not in originals
    if nothing_follows or with_first in originals or no_adapter:
        return Key("whole", with_first)
    return Key("whole", without_first, adapter=first)
