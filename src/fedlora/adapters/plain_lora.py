"""Refuses adapters that are no sum of products `B A`, by what their configuration says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.adapters.peft_files import CONFIG_NAME
from fedlora.errors import InputError

MERGE = "merge it into its base by PEFT's merge_and_unload, or train it again without"
"""What to do about an adapter that is no sum of products."""
TOKENS = (
    "embeddings of single tokens that were trained are no low-rank update; train whole "
    "embeddings (modules_to_save), or resize the vocabulary once, save that base and give it "
    "to everybody"
)
"""What to do about embeddings of single tokens that were trained."""
_PLAIN: dict[str, tuple[Any, str]] = {
    "peft_type": ("LORA", "train with LoraConfig or AdaLoraConfig"),
    "use_dora": (False, f"DoRA's magnitudes are no sum; {MERGE}"),
    "bias": ("none", f"biases that were trained are no low-rank update; {MERGE}"),
    "lora_bias": (False, f"a bias at lora_B is no part of B A; {MERGE}"),
    "use_qalora": (False, MERGE),
    "alora_invocation_tokens": (None, "it acts on some tokens alone; train it again without"),
    "layer_replication": (None, MERGE),
    "use_bdlora": (None, MERGE),
    "kasa_config": (None, MERGE),
    "arrow_config": (None, MERGE),
    "monteclora_config": (None, MERGE),
    "trainable_token_indices": (None, TOKENS),
}
"""Key of PEFT's configuration -> the value it has in plain LoRA, and what to do about another."""
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that change the base weights too, so that the factors belong to these."""
TASKS = (
    "CAUSAL_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
    "SEQ_2_SEQ_LM",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


def check_plain(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a directory whose configuration says that its update is not `sum s B A` alone.

    Args:
        path: the directory, for messages.
        config: contents of its `adapter_config.json`.

    Raises:
        InputError: which key, why, and what to do.
    """
    kind = config.get("peft_type", "LORA")
    for key, (plain, advice) in _PLAIN.items():
        value = config.get(key, plain)
        # A switch that is off may be false, null or an empty list; older PEFT lacks some keys.
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
            f"version of PEFT, which today's cannot load; {MERGE}"
        )
    if str(init := config.get("init_lora_weights")).startswith(_CHANGES_BASE):
        raise InputError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights too; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion to make it plain LoRA"
        )
    _check_types(path / CONFIG_NAME, config)


def _check_types(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse values of a kind that no version of PEFT writes, before anything is computed."""
    for key in ("r", "lora_alpha", "init_r"):
        value = config.get(key)
        absent = key == "init_r" and value is None
        if not (_is_number(value) or absent):
            raise InputError(f"{path}: {key} is {_short(value)}; expected a number")
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        # AdaLoRA keeps masks of ranks there; its factors say the same.
        masks = config.get("peft_type") == "ADALORA" and key == "rank_pattern"
        numbers = isinstance(value, dict) and all(map(_is_number, value.values()))
        if not (numbers or masks):
            raise InputError(f"{path}: {key} is {_short(value)}; expected names and numbers")
    task = config.get("task_type")
    if task is not None and task not in TASKS:
        raise InputError(
            f"{path}: task_type is {_short(task)}; expected null or one of {', '.join(TASKS)}"
        )
    for key in ("base_model_name_or_path", "revision"):
        value = config.get(key)
        if value is not None and not _is_name(value):
            raise InputError(f"{path}: {key} is {_short(value)}; expected a text or null")
    for key in ("modules_to_save", "target_modules"):
        value = config.get(key)
        names = value if isinstance(value, list) else [value]
        if value is not None and not all(map(_is_name, names)):
            raise InputError(f"{path}: {key} is {_short(value)}; expected a list of names")


def _is_number(value: Any) -> bool:
    """Whether this is a finite number that a 64-bit integer could hold."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < 2**63
        and math.isfinite(value)
    )


def _is_name(value: Any) -> bool:
    """Whether this is a text that can be printed: half a surrogate pair cannot."""
    return isinstance(value, str) and value.isprintable()


def _short(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
