"""Sorts the tensors of a PEFT directory: factors, modules trained whole, weights of the base."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.keys import PREFIX, Key, read_keys
from fedlora.adapters.peft_files import CONFIG_NAME, as_float
from fedlora.adapters.plain_lora import MERGE, TOKENS
from fedlora.errors import InputError

_SHARDS = (
    ". DeepSpeed ZeRO-3 and FSDP leave such shards where weights are not gathered: save the "
    "adapter again from gathered weights"
)
_UNASKED = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
"""Heads PEFT saves unasked, by task. It names all of them, and a model has one."""


def modules_to_save(config: Mapping[str, Any]) -> list[str]:
    """PEFT's `modules_to_save` as a list."""
    value = config.get("modules_to_save") or []
    return [value] if isinstance(value, str) else [str(name) for name in value]


@dataclass(frozen=True)
class SortedWeights:
    """The weights of a directory by what they are.

    Args:
        factors: target module -> `A` `(r, n)` and `B` `(m, r)`, and with AdaLoRA `E` `(r, 1)`.
        embeddings: the target modules that are embeddings.
        dense: parameters trained whole, by their full names.
        base: weights of the base to be carried along, by their names in the base.
        fingerprints: other weights of the base by a digest, to tell bases apart.
    """

    factors: dict[str, dict[str, Tensor]]
    embeddings: frozenset[str]
    dense: dict[str, Tensor]
    base: dict[str, Tensor]
    fingerprints: dict[str, str]


class _Role(Enum):
    """What becomes of a tensor."""

    FACTOR = "combined with the others of its module"
    TRAINED = "averaged whole"
    SKIPPED = "repeats what other tensors say"
    REFUSED = "can be neither combined nor carried along"
    FINGERPRINT = "a weight of the base, compared with that of other adapters"
    BASE = "a weight of the base, carried along"


def sort_weights(
    path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> SortedWeights:
    """Sort the tensors of a PEFT directory by what becomes of them.

    Args:
        path: the directory, for messages.
        config: contents of its `adapter_config.json`.
        weights: key in the file -> tensor.

    Raises:
        InputError: a tensor can be neither combined nor carried along; why, and what to do.
    """
    try:
        keys = read_keys(weights)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    factors: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    fingerprints: dict[str, str] = {}
    heads = _UNASKED.get(str(config.get("task_type")), ())
    trained = [*modules_to_save(config), *heads]
    # PEFT saves neither the original of a trained copy nor an adapter's name: with one of them the
    # file is the state dict of the whole model.
    raw = any(key.kind == "original" or key.adapter is not None for key in keys.values())
    for text, key in keys.items():
        value = weights[text]
        role = _role(text, key, value, trained, raw)
        if role is _Role.FACTOR:
            _add_factor(path, text, key, value, factors)
        elif role is _Role.TRAINED:
            _put(path, dense, key.name, as_float(path, text, value))
        elif role is _Role.BASE:
            _put(path, base, key.name, as_float(path, text, value))
        elif role is _Role.FINGERPRINT:
            fingerprints[key.name] = _fingerprint(value)
        elif role is _Role.REFUSED:
            raise InputError(
                f"{path}: cannot use the tensor {text} {tuple(value.shape)}"
                + _why_refused(text, key)
            )
    for name in _tied(config, dense, base):
        dense[name] = base.pop(name)
    _check_factors(path, config, factors)
    _check_trained(path, config, dense, heads)
    embeddings = {name for name, pair in factors.items() if "embedding_A" in pair}
    by_part = {
        name: {part.removeprefix("embedding_"): t for part, t in pair.items()}
        for name, pair in factors.items()
    }
    return SortedWeights(by_part, frozenset(embeddings), dense, base, fingerprints)


def _role(text: str, key: Key, value: Tensor, trained: Sequence[str], raw: bool) -> _Role:
    """What becomes of a tensor.

    Args:
        text: its key as it stands in the file.
        key: what that key names.
        value: the tensor.
        trained: modules trained whole.
        raw: the file is a state dict of the whole model rather than what PEFT saves.
    """
    if key.kind == "lora":
        return _Role.FACTOR
    if key.kind == "whole" or (key.kind == "plain" and saved_whole(key.name, trained)):
        return _Role.TRAINED
    if key.kind == "original" or key.name.endswith(".ranknum") or ".ranknum." in key.name:
        return _Role.SKIPPED
    unknown = bool(_why_refused(text, key))
    if unknown and (not raw or "trainable_tokens" in text):
        return _Role.REFUSED
    if raw and (unknown or not _may_be_resized(key.name, value)):
        return _Role.FINGERPRINT
    return _Role.BASE


def _check_trained(
    path: Path, config: Mapping[str, Any], dense: Mapping[str, Tensor], heads: Sequence[str]
) -> None:
    """Refuse a module of `modules_to_save` without weights; of a task's heads one is enough."""
    absent = [module for module in modules_to_save(config) if not holds(dense, module)]
    if any(holds(dense, head) for head in heads):
        absent = [module for module in absent if module not in heads]
    if absent:
        raise InputError(
            f"{path}: modules_to_save names {', '.join(map(str, absent))}, but there are no such "
            "weights in it; save the adapter again with them, or take the name out of "
            f"{CONFIG_NAME}"
        )


def _add_factor(
    path: Path, text: str, key: Key, value: Tensor, factors: dict[str, dict[str, Tensor]]
) -> None:
    """Add a factor to those of its module, or refuse it."""
    if why := _why_no_factor(text, key, value):
        raise InputError(f"{path}: cannot use the tensor {text} {tuple(value.shape)}: {why}")
    pair = factors.setdefault(key.name, {})
    _put(path, pair, key.part, as_float(path, text, value), called=key.name)


def _why_no_factor(text: str, key: Key, value: Tensor) -> str:
    """Why a tensor at a LoRA layer is no factor `A` or `B` of a linear layer; empty: it is one."""
    if key.part not in ("A", "B", "E", "embedding_A", "embedding_B"):
        kind = {
            "B.bias": "a bias at lora_B (lora_bias)",
            "magnitude_vector": "a magnitude of DoRA",
        }.get(key.part, "no factor of plain LoRA")
        return f"it is {kind}, no part of B A; {MERGE}"
    if key.name.endswith(".base_layer"):
        return (
            "it changes a parameter beside another one of the same module "
            f"(target_parameters, mostly of experts), which is no linear layer; {MERGE}"
        )
    if value.ndim in (3, 4, 5):
        return f"it is of a convolution or a grouped layer; {MERGE}"
    if value.ndim != 2:
        return f"a factor has two dimensions{_SHARDS}"
    # loralib's names have neither PEFT's prefix nor an end; other names without it are unknown.
    if key.adapter is None and PREFIX not in text and not text.endswith((".lora_A", ".lora_B")):
        return (
            f"a name without PEFT's {PREFIX} before it; save the adapter by PEFT's save_pretrained"
        )
    return ""


def _put(
    path: Path, tensors: dict[str, Tensor], name: str, value: Tensor, called: str = ""
) -> None:
    """Add a tensor under its name. Two keys may name the same one, if their tensors are equal.

    Args:
        path: the directory, for a message.
        tensors: to which it is added.
        name: of the tensor.
        value: the tensor.
        called: its name in a message, where that is another one.
    """
    first = tensors.setdefault(name, value)
    if first is not value and not same_weights(first, value):
        raise InputError(
            f"{path}: {called or name} is in it twice under different keys, with different values; "
            "save the adapter by model.save_pretrained"
        )


def _check_factors(
    path: Path, config: Mapping[str, Any], factors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Refuse a module that lacks a factor, or whose factors have different ranks."""
    if not factors:
        raise InputError(f"{path}: holds no LoRA factors")
    adaptive = config.get("peft_type") == "ADALORA"
    for name, pair in factors.items():
        a = pair.get("A", pair.get("embedding_A"))
        b = pair.get("B", pair.get("embedding_B"))
        kinds = [{"A", "B", "E"}] if adaptive else [{"A", "B"}, {"embedding_A", "embedding_B"}]
        fits = a is not None and b is not None and a.shape[0] == b.shape[1]
        if fits and adaptive and "E" in pair:
            assert a is not None
            fits = pair["E"].shape == (a.shape[0], 1)
        if not fits or set(pair) not in kinds:
            raise InputError(f"{path}: the factors of {name} are incomplete or do not fit")
        if not adaptive and any(0 in t.shape for t in pair.values()):
            raise InputError(f"{path}: a factor of {name} is empty{_SHARDS}")


def _why_refused(text: str, key: Key) -> str:
    """Why a tensor that is no factor cannot be carried along; empty: it can be."""
    if "trainable_tokens" in text or ".token_adapter." in text:
        return f": {TOKENS}"
    if not text.endswith((".weight", ".bias")) or ".lora_" in text:
        return ": it is neither a factor of LoRA nor a weight of a known module"
    return ""


def why_other_rank(rank: int, configured: float, config: Mapping[str, Any]) -> str:
    """What to add to the complaint that a module's factors have another rank than configured."""
    if config.get("target_parameters") and rank % configured == 0:
        return (
            f": {rank / configured:.0f} times that, one adapter for each expert (target_parameters)"
            f". These act on a tensor of all experts, which is no linear layer; {MERGE}"
        )
    return ""


def _tied(
    config: Mapping[str, Any], dense: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> list[str]:
    """Names of weights in `base` that were trained: they equal embeddings that they are tied to."""
    if not config.get("ensure_weight_tying"):
        return []
    return [
        name
        for name, weight in base.items()
        if any(same_weights(weight, trained) for trained in dense.values())
    ]


def same_weights(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, up to the rounding of the narrower of their dtypes."""
    if one.shape != other.shape:
        return False
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)


def _may_be_resized(name: str, value: Tensor) -> bool:
    """Whether a weight may be that of embeddings or an output layer, with a row for each token.

    PEFT saves these with an adapter where the vocabulary was resized.
    """
    table = value.ndim == 2 and value.shape[0] > value.shape[1]
    return table and not any(part.isdecimal() for part in name.split("."))


def _fingerprint(value: Tensor) -> str:
    """A tensor's dtype, shape and digest, as text; empty: it has none."""
    on_cpu = value.detach().to("cpu").contiguous()
    try:
        data = on_cpu.flatten().view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError):  # a dtype of less than a byte
        return ""
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"


def holds(dense: Mapping[str, Tensor], module: str) -> bool:
    """Whether parameters of a module that `modules_to_save` names are among these."""
    return any(saved_whole(name, [module]) for name in dense)


def saved_whole(parameter: str, modules: Sequence[str]) -> bool:
    """Whether a parameter lies in a module that `modules_to_save` names.

    PEFT means by a name all modules whose full names end in its letters, so that `classifier` is
    DistilBERT's `pre_classifier` too.
    """
    owner = f"{parameter.rpartition('.')[0]}."
    return any(f"{module}." in owner for module in modules)
