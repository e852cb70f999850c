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
        kind: `lora` (a factor), `whole` (the trained copy of a module in `modules_to_save`),
            `original` (the untrained module beside that copy), `base` (a weight under a LoRA
            layer), `plain` (any other parameter).
        name: of the module for `lora`, else of the parameter, as in the model without PEFT.
        part: of a factor: `A`, `B`, `E`, `embedding_A` ...
        adapter: the adapter's name; None where the key does not say it.
    """

    kind: str
    name: str
    part: str = ""
    adapter: str | None = None


def unwrapped(key: str) -> str:
    """A key without PEFT's prefix, and without parts that wrappers around the model put into it."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    ends = [i + 2 for i in range(len(parts) - 2) if parts[i : i + 2] == ["base_model", "model"]]
    parts = parts[ends[-1] :] if ends else parts
    while len(parts) > 2 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def read_keys(keys: Iterable[str]) -> dict[str, Key]:
    """What every key of a state dict names.

    Args:
        keys: of the state dict of one adapter.

    Returns:
        Key -> what it names, in the same order.

    Raises:
        InputError: the keys are of several adapters.
    """
    names = {key: unwrapped(key) for key in keys}
    read: dict[str, Key] = {}
    for key, name in names.items():
        if match := _LORA.match(name):
            part = match["part"] if match["end"] != "bias" else f"{match['part']}.bias"
            read[key] = Key("lora", match[1], part, match["adapter"])
        elif _BASE in f".{name}":
            read[key] = Key("base", name.replace(_BASE.lstrip("."), "", 1))
        elif _ORIGINAL in f".{name}":
            read[key] = Key("original", name.replace(_ORIGINAL.lstrip("."), "", 1))
        elif _COPY not in f".{name}":
            read[key] = Key("plain", name)
    adapters = {key.adapter for key in read.values() if key.kind == "lora"} - {None}
    originals = {key.name for key in read.values() if key.kind == "original"}
    # Only the other keys tell whether the key of a trained copy names the adapter too.
    for key, name in names.items():
        if key not in read:
            read[key] = _trained_copy(name, adapters, originals)
    several = sorted({key.adapter for key in read.values() if key.adapter is not None})
    if len(several) > 1:
        raise InputError(
            f"its weights hold several adapters ({', '.join(several)}); save one of them alone: "
            "model.save_pretrained(directory, selected_adapters=[name])"
        )
    return {key: read[key] for key in names}


def _trained_copy(name: str, adapters: Collection[str | None], originals: Collection[str]) -> Key:
    """The key of a trained copy of a module, `x.modules_to_save.y.weight`.

    In a state dict that was saved raw, y is the adapter's name. In what PEFT saves, y may be a
    module inside of x: it is one if there is an original of that name, or if no key names an
    adapter.

    Args:
        name: the key without wrappers.
        adapters: names of adapters in other keys.
        originals: names of the parameters whose originals are there.
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
