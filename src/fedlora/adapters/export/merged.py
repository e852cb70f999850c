"""Merges an update into its base, `W + dW` in float32, tensor by tensor from disk to disk.

The keys of the result are those of the base's own checkpoint, so that whatever reads the base
reads the result. Weights trained whole take the place of the base's. Two names that are one tensor
in the base (tied weights) stay one where both change alike; else each gets its own and the
configuration says that they are no longer tied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.export.checkpoint import Checkpoint, TensorInfo, tensors_of, write_shards
from fedlora.adapters.renaming import renamer
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError
from fedlora.lowrank import LowRank, wide
from fedlora.model.layers import is_conv1d

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a merged model can be saved in."""


@dataclass(frozen=True)
class Part:
    """How one tensor of the result is made.

    Args:
        info: what it will be.
        source: its key in the base's checkpoint; None: `whole` takes its place.
        update: what is added to it, None for nothing.
        transposed: the tensor is stored `(n, m)`, as embeddings and Conv1D layers are.
        whole: a value trained whole, in the place of the base's.
    """

    info: TensorInfo
    source: str | None = None
    update: LowRank | None = None
    transposed: bool = False
    whole: Tensor | None = None


@dataclass(frozen=True)
class MergePlan:
    """How the merged checkpoint is made of the base's.

    Args:
        checkpoint: of the base.
        parts: key of the result -> how it is made, in the order they are written.
        untied: weights that are one in the base are two in the result.
    """

    checkpoint: Checkpoint
    parts: Mapping[str, Part]
    untied: bool

    def make(self, key: str) -> Tensor:
        """One tensor of the result: `W + B A` in float32, in the dtype announced.

        Raises:
            InputError: a value does not fit into that dtype.
        """
        part = self.parts[key]
        value = self._value(part)
        if part.update is not None:
            x = part.update
            value = wide(value)
            (value.T if part.transposed else value).addmm_(x.B.to(value), x.A.to(value))
        made = value.to(part.info.dtype)
        if made.is_floating_point() and not torch.isfinite(made).all():
            raise InputError(
                f"{key}: holds values that {_name(part.info.dtype)} cannot; give another --dtype, "
                "bfloat16 or float32"
            )
        return made

    def _value(self, part: Part) -> Tensor:
        """The tensor before an update is added to it, with memory of its own."""
        if part.whole is not None:
            return part.whole.clone()
        assert part.source is not None
        return self.checkpoint.read(part.source)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuse_quantised(config: Any, name: str) -> None:
    """Refuse a base whose weights are quantised: there is nothing to add an update to.

    Raises:
        InputError: and the way round it.
    """
    quantised = getattr(config, "quantization_config", None)
    if not quantised:
        return
    of = quantised if isinstance(quantised, Mapping) else getattr(quantised, "__dict__", {})
    raise InputError(
        f"{name}: its weights are quantised ({of.get('quant_method', 'unknown')}); an update "
        "cannot be added to them without rounding it away. Give the unquantised model with --base "
        "and quantise the result, or take --format peft, which leaves the base as it is"
    )


def plan_merge(
    skeleton: Any,
    checkpoint: Checkpoint,
    adapter: SavedAdapter,
    deltas: Mapping[str, LowRank],
    dtype: torch.dtype | None,
) -> MergePlan:
    """Find out how every tensor of the result is made; no weights are read.

    Args:
        skeleton: the model of transformers that is to result, which may have no weights.
        checkpoint: the base's weights.
        adapter: what is trained whole, and which modules are embeddings.
        deltas: target module -> what is added.
        dtype: of all floating tensors; None: as in the checkpoint.

    Raises:
        InputError: the adapter changes weights that the base does not have or holds otherwise.
    """
    names = list(skeleton.state_dict(keep_vars=True))
    keys = _keys_by_name(skeleton, names, checkpoint)
    twins = _tied(skeleton)
    changes = _changes(skeleton, adapter, deltas, twins)
    if unknown := [name for name in changes if name not in names]:
        raise InputError(f"{unknown[0]}: the adapter changes it, and the base has no such weight")
    parts: dict[str, Part] = {}
    untied = False
    for name in names:
        group = [one for one in twins.get(name, ()) if one in names] or [name]
        alike = all(_same(changes.get(one), changes.get(name)) for one in group)
        untied = untied or not alike
        key = keys.get(name)
        if key is None and (len(group) > 1 and alike):
            continue  # it is written under its twin's key
        source = key or next((keys[one] for one in group if one in keys), None)
        part = _part(name, source, changes.get(name), checkpoint, dtype)
        if part is not None:
            parts[key or name] = part
    parts |= _not_of_the_model(skeleton, checkpoint, set(keys.values()), parts, dtype)
    return MergePlan(checkpoint, _in_order(parts, checkpoint), untied)


@dataclass(frozen=True)
class _Change:
    """What becomes of one weight; of one that is trained whole `update` is None."""

    update: LowRank | None = None
    transposed: bool = False
    whole: Tensor | None = None


def _changes(
    skeleton: Any,
    adapter: SavedAdapter,
    deltas: Mapping[str, LowRank],
    twins: Mapping[str, Sequence[str]],
) -> dict[str, _Change]:
    """Full name of a parameter -> what becomes of it.

    Weights of the base that lie in the adapter are loaded into the base by PEFT, so that a name
    that is the same tensor there follows; a trained copy of one (`dense`) stands beside it.
    """
    changes = {name: _Change(whole=value) for name, value in adapter.dense.items()}
    modules = dict(skeleton.named_modules())
    for module, x in deltas.items():
        if module not in modules:
            raise InputError(f"{module}: the adapter changes it, and the base has no such module")
        transposed = module in adapter.embeddings or is_conv1d(modules[module])
        changes[f"{module}.weight"] = _Change(x, transposed)
    carried = dict(adapter.base)
    for name, value in adapter.base.items():
        carried |= {twin: value for twin in twins.get(name, ()) if twin not in adapter.base}
    for name, value in carried.items():
        before = changes.get(name, _Change())
        if before.whole is None:
            changes[name] = replace(before, whole=value)
    return changes


def _same(one: _Change | None, other: _Change | None) -> bool:
    """Whether two weights that were one are one still."""
    if one is None or other is None:
        return one is other
    if one.update is not None or other.update is not None:
        return one is other
    assert one.whole is not None
    assert other.whole is not None
    return torch.equal(one.whole, other.whole)


def _keys_by_name(skeleton: Any, names: Sequence[str], checkpoint: Checkpoint) -> dict[str, str]:
    """The model's name of a tensor -> its key in the checkpoint, of another version perhaps."""
    rename = renamer(skeleton, names)
    known = set(names)
    pairs = [(name, key) for key in checkpoint.files if (name := rename(key)) in known]
    return dict(reversed(pairs))


def _tied(skeleton: Any) -> dict[str, list[str]]:
    """Each parameter that has several names -> all of them."""
    by_tensor: dict[int, list[str]] = {}
    for name, value in skeleton.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(value), []).append(name)
    return {name: group for group in by_tensor.values() if len(group) > 1 for name in group}


def _part(
    name: str,
    source: str | None,
    change: _Change | None,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
) -> Part | None:
    """How one tensor of the model is made; None: it lies in the checkpoint under other names."""
    if change is None:
        return None if source is None else Part(_info(checkpoint.tensors[source], dtype), source)
    if change.whole is not None:
        like = checkpoint.tensors[source].dtype if source else usual_dtype(checkpoint)
        info = _info(TensorInfo(tuple(change.whole.shape), like), dtype)
        if source is not None and change.update is None:
            _check_resized(name, checkpoint.tensors[source], info)
        return Part(info, None, change.update, change.transposed, change.whole)
    assert change.update is not None
    if source is None:
        raise InputError(
            f"{name}: the base's checkpoint holds it under another name or in one piece with "
            "others; load the model by transformers, save it by save_pretrained, and give that "
            "with --base"
        )
    m, n = change.update.shape
    info = _info(checkpoint.tensors[source], dtype)
    if info.shape != ((n, m) if change.transposed else (m, n)):
        raise InputError(
            f"{name}: the adapter's update is {(m, n)}, the base's weight {info.shape}; they do "
            "not belong together"
        )
    return Part(info, source, change.update, change.transposed)


def _check_resized(name: str, own: TensorInfo, new: TensorInfo) -> None:
    """Refuse an embedding with other rows than the base's: the configuration counts them."""
    is_embedding = any(part in name for part in ("embed", "wte", "lm_head"))
    if is_embedding and own.shape != new.shape:
        raise InputError(
            f"{name}: of the shape {new.shape}, and {own.shape} in the base: its vocabulary was "
            "resized. Resize the base's once, save that model, and give it with --base"
        )


def _info(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """What a tensor will be: floats in the wanted dtype, all else as it is."""
    return info if dtype is None or not info.dtype.is_floating_point else replace(info, dtype=dtype)


def usual_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most of the checkpoint's numbers."""
    totals: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        totals[info.dtype] = totals.get(info.dtype, 0) + info.nbytes
    return max(totals, key=lambda dtype: totals[dtype])


def _not_of_the_model(
    skeleton: Any,
    checkpoint: Checkpoint,
    used: set[str],
    parts: Mapping[str, Part],
    dtype: torch.dtype | None,
) -> dict[str, Part]:
    """Tensors that transformers names otherwise once it has read them (experts, which it fuses).

    They are taken along where the checkpoint is of the very architecture that results. Of another
    one (a language model that became a classifier) what is left is its own head.
    """
    config = skeleton.config
    if type(skeleton).__name__ not in (getattr(config, "architectures", None) or ()):
        return {}
    left = [key for key in checkpoint.files if key not in used and key not in parts]
    return {key: Part(_info(checkpoint.tensors[key], dtype), key) for key in left}


def _in_order(parts: Mapping[str, Part], checkpoint: Checkpoint) -> dict[str, Part]:
    """In the checkpoint's order, so that its files are read once each; new tensors last."""
    places = {key: i for i, key in enumerate(checkpoint.files)}
    return dict(sorted(parts.items(), key=lambda item: places.get(item[0], len(places))))


def write_merged(directory: Path, plan: MergePlan, max_shard_size: int) -> list[Path]:
    """Write the merged weights; memory stays near the largest tensor.

    Args:
        directory: that is there.
        plan: of `plan_merge`.
        max_shard_size: bytes of a file.

    Returns:
        The files of tensors.

    Raises:
        InputError: a value does not fit into the dtype.
        OSError: a file cannot be written.
    """
    infos = {key: part.info for key, part in plan.parts.items()}
    return write_shards(directory, infos, plan.make, max_shard_size)


def largest_difference(files: Sequence[Path], plan: MergePlan) -> float:
    """The largest difference of any written weight from `W + dW` in float64.

    It is counted in units of what may happen to it on the way: rounding to the tensor's dtype, and
    adding up to hundreds of products in float32,

        unit = (eps(dtype) / 2 + 32 eps(float32)) max |W + dW|

    so that up to about 1 is rounding. Infinity says that a tensor is missing or of another shape.

    Args:
        files: of `write_merged`.
        plan: what they were written by.
    """
    written = tensors_of(files)
    if written.files.keys() != plan.parts.keys():
        return float("inf")
    return max(
        weight_difference(written.read(key), plan, part)
        if written.tensors[key] == part.info
        else float("inf")
        for key, part in plan.parts.items()
    )


def weight_difference(found: Tensor, plan: MergePlan, part: Part) -> float:
    """Of one tensor, in the units of `largest_difference`."""
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, plan._value(part)) else float("inf")
    wanted = plan._value(part).double()
    if (x := part.update) is not None:
        (wanted.T if part.transposed else wanted).addmm_(x.B.double(), x.A.double())
    if wanted.numel() == 0:
        return 0.0
    size = float(wanted.abs().max())
    unit = (torch.finfo(found.dtype).eps / 2 + 32 * torch.finfo(torch.float32).eps) * size
    gap = float((found.double() - wanted).abs().max())
    return gap / unit if unit else (0.0 if gap == 0.0 else float("inf"))
