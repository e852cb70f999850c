"""Sorts what a PEFT directory holds beside plain LoRA factors: what goes along, and what not."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.names import PREFIX, Key, read_keys
from fedlora.adapters.peft_files import CONFIG_NAME, as_float
from fedlora.errors import InputError

_MERGE = "merge it into its base by PEFT's merge_and_unload, or train it again without"
_PLAIN: dict[str, tuple[Any, str]] = {
    "peft_type": ("LORA", "train with LoraConfig or AdaLoraConfig"),
    "use_dora": (False, f"DoRA's magnitudes are no sum; {_MERGE}"),
    "bias": ("none", f"biases that were trained are no low-rank update; {_MERGE}"),
    "lora_bias": (False, f"a bias at lora_B is no part of B A; {_MERGE}"),
    "use_qalora": (False, _MERGE),
    "alora_invocation_tokens": (None, "it acts on some tokens alone; train it again without"),
    "layer_replication": (None, _MERGE),
    "use_bdlora": (None, _MERGE),
    "kasa_config": (None, _MERGE),
    "arrow_config": (None, _MERGE),
    "monteclora_config": (None, _MERGE),
    "trainable_token_indices": (
        None,
        "embeddings of single tokens that were trained are no low-rank update; train whole "
        "embeddings (modules_to_save), or resize the vocabulary once, save that base and give it "
        "to everybody",
    ),
}
"""Keys of PEFT's configuration: the value under which an adapter is a sum of products and nothing
else, and what to do about another."""
_SHARDS = (
    ". DeepSpeed ZeRO-3 and FSDP leave such shards where weights are not gathered: save the "
    "adapter again from gathered weights"
)
_UNASKED = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
"""Heads PEFT saves unasked, by task. It names all of them, and a model has one."""
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations whose factors are relative to base weights they changed."""
TASKS = (
    "CAUSAL_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
    "SEQ_2_SEQ_LM",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


def check_plain(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration under which the directory is no sum of products.

    Raises:
        InputError: which key, why, and what to do.
    """
    kind = config.get("peft_type", "LORA")
    for key, (plain, advice) in _PLAIN.items():
        value = config.get(key, plain)
        # Switches are false in many spellings; older versions of PEFT lack some keys.
        if value == plain or (not value and key not in ("peft_type", "bias")):
            continue
        if key == "peft_type" and kind == "ADALORA":
            continue
        raise InputError(
            f"{path}: {key} is {value!r}; only plain LoRA ({key} {plain!r}) is a sum of products "
            f"that can be combined exactly: {advice}"
        )
    fused = config.get("enable_lora")
    if fused not in (None, [], False) and not (isinstance(fused, list) and not any(fused)):
        raise InputError(
            f"{path}: enable_lora is {fused!r}: factors for parts of a fused layer, of an old "
            f"version of PEFT, which today's cannot load; {_MERGE}"
        )
    if str(init := config.get("init_lora_weights")).startswith(_CHANGES_BASE):
        raise InputError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights too; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion to make it plain LoRA"
        )
    _check_types(path / CONFIG_NAME, config)


def _check_types(path: Path, config: Mapping[str, Any]) -> None:
    def number(value: Any) -> bool:
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and abs(value) < 2**63
            and math.isfinite(value)
        )

    for key in ("r", "lora_alpha", "init_r"):
        value = config.get(key)
        if not number(value) and not (key == "init_r" and value is None):
            raise InputError(f"{path}: {key} is {_short(value)}; expected a number")
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(map(number, value.values())):
            # AdaLoRA keeps masks there, which say nothing that its factors do not.
            if config.get("peft_type") == "ADALORA" and key == "rank_pattern":
                continue
            raise InputError(f"{path}: {key} is {_short(value)}; expected names and numbers")
    task = config.get("task_type")
    if task is not None and task not in TASKS:
        raise InputError(
            f"{path}: task_type is {_short(task)}; expected null or one of {', '.join(TASKS)}"
        )
    for key in ("base_model_name_or_path", "revision"):
        value = config.get(key)
        if value is not None and not (isinstance(value, str) and _encodes(value)):
            raise InputError(f"{path}: {key} is {_short(value)}; expected a text or null")
    for key in ("modules_to_save", "target_modules"):
        value = config.get(key)
        names = [value] if isinstance(value, str) else value
        if names is not None and not (
            isinstance(names, list) and all(isinstance(x, str) and _encodes(x) for x in names)
        ):
            raise InputError(f"{path}: {key} is {_short(value)}; expected a list of names")


def _encodes(text: str) -> bool:
    return text.isprintable()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def modules_to_save(config: Mapping[str, Any]) -> list[str]:
    """PEFT's `modules_to_save` as a list."""
    value = config.get("modules_to_save") or []
    return [value] if isinstance(value, str) else [str(name) for name in value]


@dataclass(frozen=True)
class Held:
    """The weights of a directory by what they are.

    Args:
        factors: target module -> its factors `A`, `B` (and AdaLoRA's `E`).
        embeddings: the target modules that are embeddings.
        dense: parameters trained whole.
        base: weights of the base to be carried along.
        fingerprints: of other weights of the base.
    """

    factors: dict[str, dict[str, Tensor]]
    embeddings: frozenset[str]
    dense: dict[str, Tensor]
    base: dict[str, Tensor]
    fingerprints: dict[str, str]


def sort_weights(path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Held:
    """What each tensor of a directory is.

    Raises:
        InputError: one that can be neither combined nor carried along, why and what to do.
    """
    try:
        keys = read_keys(weights)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    factors: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    fingerprints: dict[str, str] = {}
    unasked = _UNASKED.get(str(config.get("task_type")), ())
    saved = [*modules_to_save(config), *unasked]
    # Only a state dict that was saved raw has what a trained copy is a copy of.
    raw = any(key.kind == "original" or key.adapter is not None for key in keys.values())
    for text, key in keys.items():
        value = weights[text]
        if key.kind == "lora":
            _add_factor(path, config, text, key, value, factors)
        elif key.kind == "whole" or (key.kind == "plain" and saved_whole(key.name, saved)):
            _put(path, dense, key.name, as_float(path, text, value))
        elif key.kind == "original" or key.name.endswith(".ranknum") or ".ranknum." in key.name:
            continue
        elif (why := _why_not(text, key)) and (not raw or "trainable_tokens" in text):
            raise InputError(f"{path}: cannot use the tensor {text} {tuple(value.shape)}{why}")
        elif raw and (why or not _may_be_resized(key.name, value)):
            fingerprints[key.name] = _fingerprint(value)
        else:
            _put(path, base, key.name, as_float(path, text, value))
    for name in _tied(config, dense, base):
        dense[name] = base.pop(name)
    _check_factors(path, config, factors)
    absent = [m for m in modules_to_save(config) if not holds(dense, m)]
    if any(holds(dense, m) for m in unasked):
        absent = [m for m in absent if m not in unasked]
    if absent:
        raise InputError(
            f"{path}: modules_to_save names {', '.join(map(str, absent))}, but there are no such "
            "weights in it; save the adapter again with them, or take the name out of "
            f"{CONFIG_NAME}"
        )
    tables = {name for name, pair in factors.items() if "embedding_A" in pair}
    plain = {
        name: {part.removeprefix("embedding_"): t for part, t in pair.items()}
        for name, pair in factors.items()
    }
    return Held(plain, frozenset(tables), dense, base, fingerprints)


def _add_factor(
    path: Path,
    config: Mapping[str, Any],
    text: str,
    key: Key,
    value: Tensor,
    factors: dict[str, dict[str, Tensor]],
) -> None:
    shape = tuple(value.shape)
    refused = f"{path}: cannot use the tensor {text} {shape}"
    if key.part not in ("A", "B", "E", "embedding_A", "embedding_B"):
        why = {
            "B.bias": "a bias at lora_B (lora_bias)",
            "magnitude_vector": "a magnitude of DoRA",
        }.get(key.part, "no factor of plain LoRA")
        raise InputError(f"{refused}: it is {why}, no part of B A; {_MERGE}")
    if key.name.endswith(".base_layer"):
        raise InputError(
            f"{refused}: it changes a parameter beside another one of the same module "
            f"(target_parameters, mostly of experts), which is no linear layer; {_MERGE}"
        )
    if value.ndim in (3, 4, 5):
        raise InputError(f"{refused}: it is of a convolution or a grouped layer; {_MERGE}")
    if value.ndim != 2:
        raise InputError(f"{refused}: a factor has two dimensions{_SHARDS}")
    if key.adapter is None and PREFIX not in text:
        raise InputError(
            f"{refused}: a name without PEFT's {PREFIX} before it, as of loralib; save the adapter "
            "by PEFT's save_pretrained"
        )
    pair = factors.setdefault(key.name, {})
    _put(path, pair, key.part, as_float(path, text, value), key.name)


def _put(path: Path, into: dict[str, Tensor], name: str, value: Tensor, of: str = "") -> None:
    """Add a tensor; the same one under two spellings is one."""
    there = into.setdefault(name, value)
    if there is not value and not same_weights(there, value):
        raise InputError(
            f"{path}: {of or name} is in it twice under different keys, with different values; "
            "save the adapter by model.save_pretrained"
        )


def _check_factors(
    path: Path, config: Mapping[str, Any], factors: Mapping[str, Mapping[str, Tensor]]
) -> None:
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


def _why_not(text: str, key: Key) -> str:
    """Why a tensor that is no factor cannot be carried along; empty: it can."""
    if "trainable_tokens" in text or ".token_adapter." in text:
        return f": {_PLAIN['trainable_token_indices'][1]}"
    if not text.endswith((".weight", ".bias")) or ".lora_" in text:
        return ": it is neither a factor of LoRA nor a weight of a known module"
    return ""


def why_other_rank(name: str, rank: int, said: float, config: Mapping[str, Any]) -> str:
    """What may be the matter where a module's factors have another rank than configured."""
    if config.get("target_parameters") and rank % said == 0:
        return (
            f": {rank / said:.0f} times that, one adapter for each expert (target_parameters). "
            f"These act on a tensor of all experts, which is no linear layer; {_MERGE}"
        )
    return ""


def _tied(
    config: Mapping[str, Any], dense: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> list[str]:
    """Weights that were trained as the copy of embeddings they are tied to."""
    if not config.get("ensure_weight_tying"):
        return []
    return [n for n, w in base.items() if any(same_weights(w, other) for other in dense.values())]


def same_weights(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, up to the rounding of the narrower of their dtypes."""
    if one.shape != other.shape:
        return False
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)


def _may_be_resized(name: str, value: Tensor) -> bool:
    """Whether a weight may be one of embeddings or an output layer, of a row for each token."""
    table = value.ndim == 2 and value.shape[0] > value.shape[1]
    return table and not any(part.isdecimal() for part in name.split("."))


def _fingerprint(value: Tensor) -> str:
    raw = value.detach().to("cpu").contiguous()
    try:
        data = raw.flatten().view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError):  # a dtype without bytes of its own
        return ""
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"


def holds(dense: Mapping[str, Tensor], module: str) -> bool:
    """Whether there are parameters of one of PEFT's `modules_to_save`."""
    return any(saved_whole(name, [module]) for name in dense)


def saved_whole(parameter: str, modules: Sequence[str]) -> bool:
    """Whether a parameter lies in one of PEFT's `modules_to_save`, by which PEFT finds all modules
    whose full names end in these letters: `classifier` is DistilBERT's `pre_classifier` too."""
    owner = f"{parameter.rpartition('.')[0]}."
    return any(f"{module}." in owner for module in modules)
