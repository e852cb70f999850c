"""Finds the modules that carry adapters, as PEFT does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedlora.errors import InputError
from fedlora.model.layers import is_conv1d, shape_of, why_unfit


@dataclass(frozen=True)
class Targets:
    """The modules that get an adapter.

    Args:
        shapes: full module name -> `(m, n)` = (out features, in features).
        names: what PEFT's `target_modules` says to get exactly these.
        fan_in_fan_out: weights are stored `(n, m)` (GPT-2's Conv1D).
        model_name: of the base, for `base_model_name_or_path`.
        revision: of the base, for `revision`.
        task_type: PEFT's name of the task.
        modules_to_save: modules trained whole, as PEFT's `modules_to_save` names them.
        model_config: the model's own configuration as JSON, saved beside a classifier's adapter:
            it holds the label names.
        embeddings: the modules that are embeddings, `(m, n)` = (width, tokens).
        left_out: linear layers that all-linear leaves out, and why: they can carry no adapter.
    """

    shapes: dict[str, tuple[int, int]]
    names: list[str]
    fan_in_fan_out: bool
    model_name: str
    revision: str | None = None
    task_type: str | None = "CAUSAL_LM"
    modules_to_save: tuple[str, ...] = ()
    model_config: str | None = None
    embeddings: frozenset[str] = frozenset()
    left_out: Mapping[str, str] = field(default_factory=dict)


def find_targets(
    model: nn.Module,
    target_modules: Sequence[str] | str | None,
    model_name: str,
    revision: str | None = None,
    modules_to_save: Sequence[str] = (),
    task_type: str = "CAUSAL_LM",
) -> Targets:
    """Resolve `lora_target_modules` as PEFT does.

    Args:
        model: a transformers model without adapters.
        target_modules: names (a module's full name or the end of it), "all-linear" (all but the
            output head), a regular expression over full names, or None: PEFT's default for the
            architecture.
        model_name: of the base.
        revision: of the base.
        modules_to_save: modules trained whole (full names); they get no adapter.
        task_type: PEFT's name of the task.

    A layer that can carry no adapter (`layers.why_unfit`) is left out of all-linear.

    Raises:
        InputError: nothing matches, or what is named can carry no adapter; the message lists
            candidates.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if name and (isinstance(module, nn.Linear) or is_conv1d(module))
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    trained_whole = {n for n in linear if _inside(n, modules_to_save)}
    free = {n: m for n, m in linear.items() if n not in trained_whole}
    if target_modules is None:
        from peft.utils import constants

        kind = str(getattr(getattr(model, "config", None), "model_type", ""))
        known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        if kind not in known:
            raise InputError(
                f"lora_target_modules: PEFT has no default for the architecture {kind!r}; give "
                f"module names, for example {_candidates(free)}, or all-linear"
            )
        target_modules = list(known[kind])
    if target_modules == "all-linear":
        chosen = {n: m for n, m in free.items() if m is not head}
    elif isinstance(target_modules, str):
        pattern, ends = target_modules, f".{target_modules}"
        try:
            chosen = {
                n: m
                for n, m in free.items()
                if n == pattern or n.endswith(ends) or re.fullmatch(pattern, n)
            }
        except re.error as error:
            raise InputError(
                f"lora_target_modules: {pattern!r} is no regular expression ({error}); expected "
                f"one over full names, or a name such as {_candidates(free)}"
            ) from None
    else:
        names = {w: {n for n in linear if n == w or n.endswith(f".{w}")} for w in target_modules}
        for wanted, found in names.items():
            if not found:
                raise InputError(
                    f"lora_target_modules: {wanted!r} "
                    + (_fused(model, wanted) or f"matches no linear layer of {model_name}")
                    + f"; it has {_candidates(free)}"
                )
            if found <= trained_whole:
                raise InputError(
                    f"lora_target_modules: {wanted!r} is trained whole (lora_modules_to_save, or a "
                    f"classifier's head) and takes no adapter; there are {_candidates(free)}"
                )
        chosen = {n: m for n, m in free.items() if any(n in found for found in names.values())}
    if not chosen:
        wanted = str(target_modules)
        raise InputError(
            f"lora_target_modules: {target_modules!r} "
            + (_fused(model, wanted) or f"matches no linear layer of {model_name}")
            + f"; it has {_candidates(free)}"
        )
    _refuse_bypassed(model, chosen)
    unfit = _lost_by_peft(model, chosen)
    unfit |= why_unfit(model, {n: m for n, m in chosen.items() if n not in unfit})
    if unfit and (target_modules != "all-linear" or len(unfit) == len(chosen)):
        name, why = next(iter(unfit.items()))
        raise InputError(
            f"lora_target_modules: {name} {why}, so it can carry no adapter (nor can it in PEFT); "
            f"name others: {_candidates({n: m for n, m in free.items() if n not in unfit})}"
        )
    chosen = {n: m for n, m in chosen.items() if n not in unfit}
    shapes = {name: shape_of(module) for name, module in chosen.items()}
    ends_of = sorted({name.rpartition(".")[2] for name in chosen})
    # PEFT matches the ends of all modules' names, not of linear layers alone.
    matched = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in ends_of}
    return Targets(
        shapes=shapes,
        names=ends_of if matched == set(chosen) else sorted(chosen),
        fan_in_fan_out=any(is_conv1d(m) for m in chosen.values()),
        model_name=model_name,
        revision=revision,
        task_type=task_type,
        modules_to_save=tuple(modules_to_save),
        left_out=unfit,
    )


_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
"""Architectures whose kernels read the weight of `out_proj` past any layer around it."""


def _refuse_bypassed(model: nn.Module, chosen: Mapping[str, Any]) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", "")
    ends = {name.rpartition(".")[2] for name in chosen}
    if kind in _STATE_SPACE and "out_proj" in ends:
        raise InputError(
            f"lora_target_modules: {kind} reads the weight of out_proj past an adapter, and PEFT "
            f"loads none there; name others: {', '.join(sorted(ends - {'out_proj'}))}"
        )


def _lost_by_peft(model: nn.Module, chosen: Mapping[str, Any]) -> dict[str, str]:
    """Layers that PEFT passes by without a word, whatever an adapter's configuration says of them.

    In some mixtures of experts it takes the ends of names (`gate_proj` of DeepSeek V3) for those of
    expert weights that transformers has fused since, and so never reaches the layers beside the
    experts that end alike. It goes by ends alone, so one name of each is tried.
    """
    try:
        from peft.tuners.tuners_utils import check_target_module_exists
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a version that does not rename
        return {}
    from peft import LoraConfig

    lost = set()
    for end, name in {name.rpartition(".")[2]: name for name in chosen}.items():
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
            found = bool(check_target_module_exists(config, name))
        except ValueError:  # it wants other expert weights beside this one
            found = False
        if not found:
            lost.add(end)
    return {
        name: "has a name that PEFT takes for fused expert weights in this architecture"
        for name in chosen
        if name.rpartition(".")[2] in lost
    }


def _inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or parameter is one of these modules or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def fused_experts(model: nn.Module) -> dict[str, int]:
    """Expert weights of a mixture of experts held as one tensor `(experts, ., .)`: name -> size."""
    return {
        name: value.numel()
        for name, value in model.named_parameters()
        if value.ndim == 3 and "expert" in name
    }


def _fused(model: nn.Module, wanted: str) -> str:
    """Why a name of fused expert weights cannot be a target; nothing where it is another name."""
    if any(f".{wanted}." in f".{name}." for name in fused_experts(model)):
        return (
            "names expert weights that are fused into one tensor for all experts, which is no "
            "linear layer; adapters go to the other layers"
        )
    return ""


def _candidates(linear: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
