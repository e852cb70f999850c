"""Reads and writes PEFT adapter directories, and finds target modules by their names.

Alpha, rsLoRA, `rank_pattern`, `alpha_pattern` and Conv1D layers are known here, PEFT's key names in
`adapter_names`, and neither anywhere else; everything past this line sees `LowRank` updates with
the scale folded into `B`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.adapter_contents import check_plain, sort_weights, why_other_rank
from fedlora.adapter_names import PREFIX
from fedlora.errors import InputError
from fedlora.layers import is_conv1d, shape_of, why_unfit
from fedlora.lowrank import Delta, Deltas, Dense, LowRank
from fedlora.peft_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    read_adapter_config,
    read_model_config,
    read_weights,
    save_tensors,
)


def scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """LoRA's scale `s`: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA (arXiv 2312.03732)."""
    return alpha / (rank**0.5 if use_rslora else rank)


def fold(a: Tensor, b: Tensor, scale: float) -> LowRank:
    """LoRA's trained `A (r, n)`, `B (m, r)` as an update: `dW = s B A`. Copies, in float32."""
    return LowRank(a.detach().float().clone(), b.detach().float() * scale)


def unfold(x: LowRank, scale: float) -> tuple[Tensor, Tensor]:
    """An update as the `A`, `B` that LoRA trains under scale s: `B / s`. Copies."""
    return x.A.detach().clone(), x.B.detach() / scale


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


def as_factors(x: Delta) -> LowRank:
    """What PEFT can hold: factors of rank at least 1, in float32.

    A dense update is its own factor beside an identity: as large as its singular factors would be,
    without their rounding.
    """
    m, n = x.shape
    if isinstance(x, Dense):
        w = x.W.float()
        x = LowRank(torch.eye(n), w) if n <= m else LowRank(w, torch.eye(m))
    if x.rank == 0:
        return LowRank(x.A.new_zeros(1, n).float(), x.B.new_zeros(m, 1).float())
    return LowRank(x.A.float().contiguous(), x.B.float().contiguous())


def write_adapter(
    path: Path,
    deltas: Deltas,
    targets: Targets,
    dense: Mapping[str, Tensor] | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an update as a PEFT adapter directory, with `alpha = r`, hence scale 1, everywhere.

    `dense` holds the parameters of `modules_to_save` by their full names, `base` weights of the
    base that are to lie beside them.

    Modules of `targets` that `deltas` does not name get a zero adapter of rank 1. The files are
    read back and compared before this returns. The same update gives the same bytes.

    Raises:
        CheckpointError: what was read back is not what was written.
        OSError: the files cannot be written.
    """
    from peft import LoraConfig

    factors = {}
    for name, (m, n) in targets.shapes.items():
        x = deltas.get(name)
        factors[name] = as_factors(
            x if x is not None else LowRank(torch.zeros(0, n), torch.zeros(m, 0))
        )
    ranks = {name: x.rank for name, x in factors.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT matches the ends of names; ^ keeps a name that is another's end to itself.
    pattern = {
        f"^{name}" if any(other.endswith(f".{name}") for other in ranks) else name: rank
        for name, rank in ranks.items()
        if rank != common
    }
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(targets.names),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=targets.fan_in_fan_out,
        base_model_name_or_path=targets.model_name,
        revision=targets.revision,
        task_type=targets.task_type,
        modules_to_save=list(targets.modules_to_save) or None,
        inference_mode=True,
    ).to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    tensors = {}
    for name, x in factors.items():
        kind, end = ("embedding_", "") if name in targets.embeddings else ("", ".weight")
        tensors[f"{PREFIX}{name}.lora_{kind}A{end}"] = x.A
        tensors[f"{PREFIX}{name}.lora_{kind}B{end}"] = x.B
    for name, value in (dense or {}).items():
        tensors[f"{PREFIX}{name}"] = _apart(value)
    for name, value in (base or {}).items():
        owner, _, end = name.rpartition(".")
        under = f"{owner}.base_layer.{end}" if owner in factors else name
        tensors[f"{PREFIX}{under}"] = _apart(value)
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG_NAME).write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
    if targets.model_config is not None:
        (path / "config.json").write_text(targets.model_config)
    save_tensors(path / WEIGHTS_NAME, tensors)


def _apart(value: Tensor) -> Tensor:
    """A tensor with memory of its own: tied weights share theirs, which a file cannot."""
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class SavedAdapter:
    """What a PEFT LoRA directory holds.

    Args:
        deltas: target module -> its update, scale folded into `B`, in float32. Of an embedding
            (see `embeddings`) it is the transpose of what its table `(tokens, width)` changes by.
        dense: parameters of `modules_to_save`, by their full names.
        config: the contents of `adapter_config.json`.
        base: weights of the base that lie in the directory too (embeddings that were resized, the
            weight under an adapter of the output layer), by their names in the base.
        embeddings: the target modules that are embeddings.
        fingerprints: weights of the base that a raw state dict repeats, by a digest.
        model_config: the model's own `config.json`, where it lies beside the adapter.
        source: the directory.
    """

    deltas: dict[str, LowRank]
    dense: dict[str, Tensor]
    config: Mapping[str, Any]
    base: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    embeddings: frozenset[str] = field(default=frozenset(), kw_only=True)
    fingerprints: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    model_config: Mapping[str, Any] | None = field(default=None, kw_only=True)
    source: str = field(default="", kw_only=True)


def load_adapter(path: str | Path) -> SavedAdapter:
    """Read a PEFT LoRA directory.

    AdaLoRA's triplets `B diag(E) A` are read too, `E` folded into `A`. State dicts that were saved
    raw, or from a wrapped or compiled model, are read as what PEFT would have saved.

    Args:
        path: a directory with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`,
            through a weights-only load).

    Raises:
        InputError: no such directory, not a plain LoRA adapter, or factors that do not fit.
    """
    path = Path(path)
    config = read_adapter_config(path)
    check_plain(path, config)
    held = sort_weights(path, config, read_weights(path))
    deltas = {name: _folded(path, name, pair, config) for name, pair in held.factors.items()}
    return SavedAdapter(
        deltas,
        held.dense,
        config,
        base=held.base,
        embeddings=held.embeddings,
        fingerprints=held.fingerprints,
        model_config=read_model_config(path),
        source=str(path),
    )


def _folded(
    path: Path, name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]
) -> LowRank:
    """The factors of a module as an update, by the rank and alpha that its configuration says."""
    a, b = parts["A"], parts["B"]
    rank = a.shape[0]
    if config.get("peft_type") == "ADALORA":
        # PEFT's AdaLoRA layer: dW = s / (init_r + 1e-5) B diag(E) A, with s = alpha.
        init = config.get("init_r") or config["r"]
        alpha = config["lora_alpha"] if config["lora_alpha"] > 0 else init
        update = fold(a.float() * parts["E"].float(), b, alpha / (init + 1e-5))
    else:
        said = _by_pattern(path, config, "rank_pattern", name, config["r"])
        if said != rank:
            raise InputError(
                f"{path}: {name} has rank {rank}, its configuration says {said}"
                + why_other_rank(name, rank, said, config)
            )
        alpha = _by_pattern(path, config, "alpha_pattern", name, config["lora_alpha"])
        update = fold(a, b, scaling(alpha, rank, bool(config.get("use_rslora"))))
    if not torch.isfinite(update.B).all() or not torch.isfinite(update.A).all():
        raise InputError(f"{path}: the factors of {name} times its scale are too large for float32")
    return update


def _by_pattern(path: Path, config: Mapping[str, Any], key: str, name: str, default: float) -> Any:
    """What PEFT takes for a module from `rank_pattern` or `alpha_pattern`."""
    from peft.utils.other import get_pattern_key

    patterns = config.get(key) or {}
    try:
        return patterns.get(get_pattern_key(list(patterns), name), default)
    except re.error as error:
        raise InputError(f"{path / CONFIG_NAME}: {key}: no regular expression: {error}") from None
