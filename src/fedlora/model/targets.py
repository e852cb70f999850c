"""Finds the modules that carry adapters, as PEFT does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedlora.errors import InputError
from fedlora.model.layers import is_conv1d, is_fan_in_fan_out, shape_of, why_unfit


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


@dataclass(frozen=True)
class _Candidates:
    """The linear layers of a model that `lora_target_modules` is matched against.

    Args:
        model: a transformers model without adapters.
        model_name: what it is called in messages.
        linear: full name -> module, of all linear layers (`nn.Linear`, Conv1D).
        free: those of them that are not trained whole, and so may get an adapter.
    """

    model: nn.Module
    model_name: str
    linear: dict[str, nn.Module]
    free: dict[str, nn.Module]

    @property
    def examples(self) -> str:
        """The ends of the free layers' names, for a message."""
        return _ends(self.free)

    def no_match(self, wanted: Sequence[str] | str, name: str) -> InputError:
        """The complaint that what was wanted matches no linear layer.

        Args:
            wanted: as the user gave it.
            name: as it would stand in the names of expert weights.
        """
        why = _fused(self.model, name) or f"matches no linear layer of {self.model_name}"
        return InputError(f"lora_target_modules: {wanted!r} {why}; it has {self.examples}")


def find_targets(
    model: nn.Module,
    target_modules: Sequence[str] | str | None,
    model_name: str,
    revision: str | None = None,
    modules_to_save: Sequence[str] = (),
    task_type: str = "CAUSAL_LM",
) -> Targets:
    """Resolve `lora_target_modules` as PEFT does.

    A layer that can carry no adapter (`layers.why_unfit`) is left out of all-linear, and refused
    where it is named.

    Args:
        model: a transformers model without adapters.
        target_modules: names (a module's full name or the end of it), "all-linear" (all but the
            output head), a regular expression over full names, or None: PEFT's default for the
            architecture.
        model_name: of the base.
        revision: of the base.
        modules_to_save: modules trained whole (full names); they get no adapter.
        task_type: PEFT's name of the task.

    Raises:
        InputError: nothing matches, or what is named can carry no adapter; the message lists
            candidates.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if name and (isinstance(module, nn.Linear) or is_conv1d(module))
    }
    free = {n: module for n, module in linear.items() if not _inside(n, modules_to_save)}
    candidates = _Candidates(model, model_name, linear, free)
    if target_modules is None:
        target_modules = _peft_default(candidates)
    chosen = _matching(candidates, target_modules)
    _refuse_bypassed(model, chosen)
    unfit = _lost_by_peft(model, chosen)
    unfit |= why_unfit(model, {n: m for n, m in chosen.items() if n not in unfit})
    if unfit and (target_modules != "all-linear" or len(unfit) == len(chosen)):
        name, why = next(iter(unfit.items()))
        fit = {n: m for n, m in free.items() if n not in unfit}
        raise InputError(
            f"lora_target_modules: {name} {why}, so it can carry no adapter (nor can it in PEFT); "
            f"name others: {_ends(fit)}"
        )
    targets = {n: m for n, m in chosen.items() if n not in unfit}
    return Targets(
        shapes={name: shape_of(module) for name, module in targets.items()},
        names=_names_for_peft(model, targets),
        fan_in_fan_out=any(is_fan_in_fan_out(module) for module in targets.values()),
        model_name=model_name,
        revision=revision,
        task_type=task_type,
        modules_to_save=tuple(modules_to_save),
        left_out=unfit,
    )


# --- what the user's words name ---


def _peft_default(candidates: _Candidates) -> list[str]:
    """The names that PEFT takes for the architecture where none are given."""
    from peft.utils import constants

    kind = str(getattr(getattr(candidates.model, "config", None), "model_type", ""))
    defaults = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if kind not in defaults:
        raise InputError(
            f"lora_target_modules: PEFT has no default for the architecture {kind!r}; give "
            f"module names, for example {candidates.examples}, or all-linear"
        )
    return list(defaults[kind])


def _matching(candidates: _Candidates, wanted: Sequence[str] | str) -> dict[str, nn.Module]:
    """The free layers that are meant, at least one."""
    if wanted == "all-linear":
        head = getattr(candidates.model, "get_output_embeddings", lambda: None)()
        chosen = {n: module for n, module in candidates.free.items() if module is not head}
    elif isinstance(wanted, str):
        chosen = _matching_pattern(candidates, wanted)
    else:
        chosen = _matching_names(candidates, wanted)
    if not chosen:
        raise candidates.no_match(wanted, str(wanted))
    return chosen


def _matching_pattern(candidates: _Candidates, pattern: str) -> dict[str, nn.Module]:
    """The free layers of this name, with this end of a name, or matched by it as an expression."""
    try:
        return {
            name: module
            for name, module in candidates.free.items()
            if _has_name(name, pattern) or re.fullmatch(pattern, name)
        }
    except re.error as error:
        raise InputError(
            f"lora_target_modules: {pattern!r} is no regular expression ({error}); expected "
            f"one over full names, or a name such as {candidates.examples}"
        ) from None


def _matching_names(candidates: _Candidates, wanted: Sequence[str]) -> dict[str, nn.Module]:
    """The free layers of these names; every name has to be that of one."""
    chosen = set()
    for end in wanted:
        named = {name for name in candidates.linear if _has_name(name, end)}
        if not named:
            raise candidates.no_match(end, end)
        if named.isdisjoint(candidates.free):
            raise InputError(
                f"lora_target_modules: {end!r} is trained whole (lora_modules_to_save, or a "
                f"classifier's head) and takes no adapter; there are {candidates.examples}"
            )
        chosen |= named
    return {name: module for name, module in candidates.free.items() if name in chosen}


def _has_name(name: str, end: str) -> bool:
    """Whether a module's full name is this, or ends in it after a dot."""
    return name == end or name.endswith(f".{end}")


def _names_for_peft(model: nn.Module, targets: Mapping[str, nn.Module]) -> list[str]:
    """The shortest `target_modules` by which PEFT finds exactly these modules.

    PEFT matches the ends of all modules' names, not of linear layers alone. Where another module
    ends alike, full names are given.
    """
    ends = sorted({name.rpartition(".")[2] for name in targets})
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return ends if matched == set(targets) else sorted(targets)


# --- what can carry no adapter ---

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
            reached = bool(check_target_module_exists(config, name))
        except ValueError:  # it wants other expert weights beside this one
            reached = False
        if not reached:
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


def _ends(modules: Mapping[str, Any]) -> str:
    """The ends of modules' names, each once, for a message."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in modules))
