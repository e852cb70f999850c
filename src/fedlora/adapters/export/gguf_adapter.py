"""Writes and reads LoRA adapters as GGUF files, as llama.cpp loads them beside a base.

    general.type        adapter
    adapter.type        lora
    adapter.lora.alpha  one number; llama.cpp scales every module by alpha / its own rank
    NAME.weight.lora_a  A (r, n)
    NAME.weight.lora_b  B (m, r), rows laid out as those of the weight (`gguf_layout`)

Of an embedding, lora_a is `A^T (tokens, r)`. One rank for all modules and alpha = r make every
scale 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.export.gguf_layout import Layout, gguf_package, layout_of_file
from fedlora.errors import InputError
from fedlora.lowrank import LowRank

ADAPTER = "adapter.gguf"
"""What the file is called in an export."""


def write_gguf_adapter(
    path: Path,
    factors: Mapping[str, LowRank],
    embeddings: Collection[str],
    layout: Layout,
    name: str = "",
) -> None:
    """Write an adapter of scale 1, in float32.

    Args:
        path: the file.
        factors: transformers' name of a module -> `A (r, n)`, `B (m, r)`, of one rank.
        embeddings: those of them that are embeddings.
        layout: of the base.
        name: of the adapter, for people.

    Raises:
        InputError: a module that llama.cpp does not have.
        OSError: the file cannot be written.
        ValueError: factors of several ranks.
    """
    ranks = {x.rank for x in factors.values()}
    if len(ranks) != 1:
        raise ValueError(f"GGUF adapters here have one rank, got {sorted(ranks)}")
    names = layout.names()
    if unknown := [module for module in factors if module not in names]:
        raise InputError(f"--format gguf: {unknown[0]}: llama.cpp has no such module")
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()))
    if name:
        writer.add_name(name)
    if layout.heads:  # so that the rows can be put back without the base
        writer.add_head_count(layout.heads)
        writer.add_head_count_kv(layout.kv_heads)
    for module, x in factors.items():
        a = x.A.T if module in embeddings else x.A
        for end, value in (("a", a), ("b", layout.interleaved(module, x.B))):
            writer.add_tensor(f"{names[module]}.weight.lora_{end}", _array(value))
    _finish(writer)


def _array(value: Tensor) -> Any:
    return value.detach().float().contiguous().numpy()


def _finish(writer: Any) -> None:
    """Write all that was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class GgufAdapter:
    """What a GGUF file of an adapter holds.

    Args:
        deltas: transformers' name of a module -> its update, scale folded in, in float32.
        embeddings: the modules that are embeddings.
        architecture: llama.cpp's name of it.
    """

    deltas: dict[str, LowRank]
    embeddings: frozenset[str]
    architecture: str


def read_gguf_adapter(path: Path, facts: Mapping[str, int] | None = None) -> GgufAdapter:
    """Read an adapter's file, as llama.cpp would compute with it: `alpha / r B A`.

    Args:
        path: the file.
        facts: `heads` and `kv_heads` of the base, where the file itself does not count them.

    Raises:
        InputError: no LoRA adapter, or one that cannot be read here, and why.
    """
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path}: cannot be read as GGUF: {error}") from None
    kind, of = _text(reader, "general.type"), _text(reader, "adapter.type")
    if (kind, of) != ("adapter", "lora"):
        what = "a whole model" if kind in ("", "model") else f"{kind} {of}".strip()
        raise InputError(f"{path}: is {what} and no LoRA adapter")
    architecture = _text(reader, "general.architecture")
    counted = {
        "heads": _number(reader, f"{architecture}.attention.head_count"),
        "kv_heads": _number(reader, f"{architecture}.attention.head_count_kv"),
    }
    known = {**(facts or {}), **{key: int(value) for key, value in counted.items() if value}}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        layout = layout_of_file(architecture, list(tensors), known)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    modules = {name: module for module, name in layout.names().items()}
    alpha = _number(reader, gguf.Keys.Adapter.LORA_ALPHA)
    deltas, embeddings = dict[str, LowRank](), set[str]()
    for name in dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors):
        module = modules.get(name.removesuffix(".weight"))
        if module is None or f"{name}.lora_a" not in tensors or f"{name}.lora_b" not in tensors:
            raise InputError(
                f"{path}: {name or next(iter(tensors))}: is no module of {architecture} with both "
                "its factors"
            )
        a, b = (_tensor(gguf, tensors[f"{name}.lora_{end}"]) for end in "ab")
        if module == "model.embed_tokens":
            a = a.T.contiguous()
            embeddings.add(module)
        if a.shape[0] != b.shape[1]:
            raise InputError(f"{path}: the factors of {module} are of two ranks")
        scale = alpha / a.shape[0] if alpha else 1.0
        deltas[module] = LowRank(a, scale * layout.separated(module, b))
    return GgufAdapter(deltas, frozenset(embeddings), architecture)


def _text(reader: Any, key: str) -> str:
    """A text of the file's header; empty where it has none."""
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def _number(reader: Any, key: str) -> float:
    """A number of the file's header; 0 where it has none."""
    field = reader.get_field(key)
    return 0.0 if field is None else float(field.contents())


def _tensor(gguf: Any, tensor: Any) -> Tensor:
    """A tensor in float32; quantised ones are computed back."""
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
