"""Reads and writes PEFT adapter directories.

Alpha, rsLoRA, `rank_pattern`, `alpha_pattern` and Conv1D layers are known here, PEFT's key names in
`names`, and neither anywhere else: all other code sees `LowRank` updates with the scale folded into
`B`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.contents import sort_weights, why_other_rank
from fedlora.adapters.keys import PREFIX
from fedlora.adapters.peft_files import (
    CONFIG_NAME,
    MODEL_CONFIG_NAME,
    WEIGHTS_NAME,
    read_adapter_config,
    read_model_config,
    read_weights,
    save_tensors,
)
from fedlora.adapters.plain_lora import check_plain
from fedlora.errors import InputError
from fedlora.lowrank import Delta, Deltas, Dense, LowRank, fold, scaling, zeros
from fedlora.model.targets import Targets


def as_factors(x: Delta) -> LowRank:
    """An update in the form in which PEFT holds it: float32 factors of rank at least 1.

    A dense `W (m, n)` becomes the product of itself and an identity. This takes as many numbers as
    its `min(m, n)` singular directions would, and is exact.
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

    The files are read back and compared before this returns. The same update gives the same bytes.

    Args:
        path: the directory; what it holds of these names is overwritten.
        deltas: target module -> its update. Modules of `targets` that have none get a zero adapter
            of rank 1.
        targets: the modules, and what PEFT's configuration says of them.
        dense: the parameters of `modules_to_save` by their full names.
        base: weights of the base that are to lie beside them.

    Raises:
        CheckpointError: what was read back is not what was written.
        OSError: the files cannot be written.
    """
    factors = {
        name: as_factors(deltas[name] if name in deltas else zeros(shape))
        for name, shape in targets.shapes.items()
    }
    config = _peft_config({name: update.rank for name, update in factors.items()}, targets)
    tensors = _factor_tensors(factors, targets.embeddings)
    for name, value in (dense or {}).items():
        tensors[f"{PREFIX}{name}"] = _own_copy(value)
    for name, value in (base or {}).items():
        owner, _, end = name.rpartition(".")
        # PEFT calls the weight under an adapter that of its module's `base_layer`.
        peft_name = f"{owner}.base_layer.{end}" if owner in factors else name
        tensors[f"{PREFIX}{peft_name}"] = _own_copy(value)
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (path / CONFIG_NAME).write_text(text + "\n")
    if targets.model_config is not None:
        (path / MODEL_CONFIG_NAME).write_text(targets.model_config)
    save_tensors(path / WEIGHTS_NAME, tensors)


def _peft_config(ranks: Mapping[str, int], targets: Targets) -> dict[str, Any]:
    """The contents of `adapter_config.json`: the commonest rank, and a pattern for the others."""
    from peft import LoraConfig

    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes a name in a pattern for the end of module names. Where it is the end of another
    # module's name too, ^ says that it is the whole name.
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
    # PEFT makes a set of the target modules. Its order differs from process to process, and the
    # file's bytes must not.
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def _factor_tensors(
    factors: Mapping[str, LowRank], embeddings: frozenset[str]
) -> dict[str, Tensor]:
    """The factors of every module by PEFT's keys."""
    tensors = {}
    for name, update in factors.items():
        kind, end = ("embedding_", "") if name in embeddings else ("", ".weight")
        tensors[f"{PREFIX}{name}.lora_{kind}A{end}"] = update.A
        tensors[f"{PREFIX}{name}.lora_{kind}B{end}"] = update.B
    return tensors


def _own_copy(value: Tensor) -> Tensor:
    """A copy in memory of its own: tied weights share memory, which safetensors refuses."""
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

    The configuration has to be that of plain LoRA or AdaLoRA. Each tensor is sorted by what its key
    names (`sort_weights`), and the factors of each module become an update with the scale folded
    in. AdaLoRA's triplets `B diag(E) A` are read too, `E` folded into `A`. State dicts that were
    saved raw, or from a wrapped or compiled model, are read as what PEFT would have saved.

    Args:
        path: a directory with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`,
            through a weights-only load).

    Raises:
        InputError: no such directory, not a plain LoRA adapter, or factors that do not fit.
    """
    path = Path(path)
    config = read_adapter_config(path)
    check_plain(path, config)
    weights = sort_weights(path, config, read_weights(path))
    deltas = {
        name: _folded(path, name, factors, config) for name, factors in weights.factors.items()
    }
    return SavedAdapter(
        deltas,
        weights.dense,
        config,
        base=weights.base,
        embeddings=weights.embeddings,
        fingerprints=weights.fingerprints,
        model_config=read_model_config(path),
        source=str(path),
    )


def _folded(
    path: Path, name: str, factors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> LowRank:
    """The factors of a module as an update, scaled as the adapter's configuration says."""
    if config.get("peft_type") == "ADALORA":
        update = _folded_adalora(factors, config)
    else:
        update = _folded_lora(path, name, factors, config)
    if not torch.isfinite(update.B).all() or not torch.isfinite(update.A).all():
        raise InputError(f"{path}: the factors of {name} times its scale are too large for float32")
    return update


def _folded_lora(
    path: Path, name: str, factors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> LowRank:
    """`dW = s B A`, with `s = alpha / r` or, with rsLoRA, `alpha / sqrt(r)`."""
    a, b = factors["A"], factors["B"]
    rank = a.shape[0]
    configured = _by_pattern(path, config, "rank_pattern", name, config["r"])
    if configured != rank:
        raise InputError(
            f"{path}: {name} has rank {rank}, its configuration says {configured}"
            + why_other_rank(rank, configured, config)
        )
    alpha = _by_pattern(path, config, "alpha_pattern", name, config["lora_alpha"])
    return fold(a, b, scaling(alpha, rank, bool(config.get("use_rslora"))))


def _folded_adalora(factors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    """`dW = alpha / (init_r + 1e-5) B diag(E) A`, as PEFT's AdaLoRA layer computes it."""
    initial_rank = config.get("init_r") or config["r"]
    alpha = config["lora_alpha"] if config["lora_alpha"] > 0 else initial_rank
    scaled_rows = factors["A"].float() * factors["E"].float()
    return fold(scaled_rows, factors["B"], alpha / (initial_rank + 1e-5))


def _by_pattern(path: Path, config: Mapping[str, Any], key: str, name: str, default: float) -> Any:
    """A module's rank or alpha: what a pattern of this key says of its name, else the default."""
    from peft.utils.other import get_pattern_key

    patterns = config.get(key) or {}
    try:
        return patterns.get(get_pattern_key(list(patterns), name), default)
    except re.error as error:
        raise InputError(f"{path / CONFIG_NAME}: {key}: no regular expression: {error}") from None
