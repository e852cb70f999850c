"""Writes a merged model as a GGUF file, tensor by tensor, and compares it with `W + dW`.

The update is added in float32, matrices are rounded once to the wanted dtype, and vectors (norms,
biases) stay float32, as llama.cpp has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.export.gguf_layout import Layout, gguf_package
from fedlora.adapters.export.gguf_vocabulary import Vocabulary
from fedlora.adapters.export.merged import MergePlan, weight_difference
from fedlora.errors import InputError

MODEL = "model.gguf"
"""What the file is called in an export."""
_ROPE_FREQS = "rope_freqs.weight"
_KINDS = {torch.float32: ("F32", 0), torch.float16: ("F16", 1), torch.bfloat16: ("BF16", 32)}
"""dtype -> GGUF's name of it, and the number of a file that mostly has it."""


def write_gguf_model(
    path: Path,
    plan: MergePlan,
    layout: Layout,
    config: Any,
    vocabulary: Vocabulary,
    dtype: torch.dtype,
    name: str = "",
) -> None:
    """Write the merged model; memory stays near the largest tensor.

    Args:
        path: the file.
        plan: of `plan_merge`, in float32.
        layout: of the model.
        config: of transformers.
        vocabulary: of its tokenizer.
        dtype: of matrices.
        name: of the model, for people.

    Raises:
        InputError: a weight or a rope that is not known here, or a value beyond the dtype.
        OSError: the file cannot be written.
    """
    gguf = gguf_package()
    tensors = _tensors(plan, layout)
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    if name:
        writer.add_name(name)
    writer.add_file_type(_KINDS[dtype][1])
    _add_configuration(writer, layout, config)
    vocabulary.add_to(writer)
    factors = rope_factors(config)
    if factors is not None:
        _announce(gguf, writer, _ROPE_FREQS, factors.shape, torch.float32)
    for key, target in tensors.items():
        shape = plan.parts[key].info.shape
        _announce(gguf, writer, target, shape, dtype if len(shape) > 1 else torch.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for key in tensors:
        value = layout.interleaved(key.rpartition(".")[0], plan.make(key))
        rounded = value.to(dtype) if value.ndim > 1 else value.float()
        if not torch.isfinite(rounded).all():
            raise InputError(f"{key}: holds values that --dtype {dtype} cannot; give another one")
        writer.write_tensor_data(rounded.contiguous().view(torch.uint8).numpy())
    writer.close()


def _announce(
    gguf: Any, writer: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Tell the writer of a tensor whose numbers follow as bytes."""
    size = dtype.itemsize
    kind = gguf.GGMLQuantizationType[_KINDS[dtype][0]]
    bytes_of_rows = (*shape[:-1], shape[-1] * size)
    writer.add_tensor_info(name, bytes_of_rows, _uint8(), math.prod(bytes_of_rows), kind)


def _uint8() -> Any:
    import numpy

    return numpy.dtype(numpy.uint8)


def _tensors(plan: MergePlan, layout: Layout) -> dict[str, str]:
    """Key of the merged checkpoint -> llama.cpp's name of the tensor."""
    names, tensors = layout.names(), dict[str, str]()
    for key in plan.parts:
        module, _, end = key.rpartition(".")
        if key.endswith("rotary_emb.inv_freq"):  # older checkpoints repeat what llama.cpp computes
            continue
        if module not in names or end not in ("weight", "bias"):
            raise InputError(
                f"--format gguf: {key}: llama.cpp's {layout.architecture} has no such weight; "
                "--format merged writes it, and llama.cpp's own converter may know what to do"
            )
        tensors[key] = f"{names[module]}.{end}"
    return tensors


def _add_configuration(writer: Any, layout: Layout, config: Any) -> None:
    """Put what llama.cpp needs to know of the architecture into the header."""
    head = _head_size(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layout.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(layout.heads)
    writer.add_head_count_kv(layout.kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _head_size(config: Any) -> int:
    """Numbers of an attention head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> Mapping[str, Any]:
    """The configuration of rotary positions, under the name of any version of transformers."""
    return {
        "rope_theta": getattr(config, "rope_theta", 10000.0),
        **(getattr(config, "rope_scaling", None) or {}),
        **(getattr(config, "rope_parameters", None) or {}),
    }


def rope_factors(config: Any) -> Tensor | None:
    """By what llama.cpp divides each frequency of rotary positions; None: it does not.

    Llama 3's scaling: frequencies whose wave is longer than `L / low` positions are divided by
    `factor`, those shorter than `L / high` stay, and between them the two are mixed.

    Raises:
        InputError: another way of scaling, which is not known here.
    """
    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(
            f"--format gguf: rotary positions scaled by {kind} are not known here; give what "
            "--format merged writes to llama.cpp's convert_hf_to_gguf.py"
        )
    head = int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    factor, low, high = (
        float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    exponents = torch.arange(0, head, 2, dtype=torch.float64) / head
    waves = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    turns = float(rope["original_max_position_embeddings"]) / waves
    mixed = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1.0 - mixed) / factor + mixed)).float()


def largest_gguf_difference(path: Path, plan: MergePlan, layout: Layout) -> float:
    """The largest difference of any weight in the file from `W + dW` in float64.

    It is counted in the units of `merged.largest_difference`, so that up to about 1 is rounding;
    infinity says that a tensor is missing or of another shape.

    Args:
        path: of `write_gguf_model`.
        plan, layout: what it was written by.
    """
    gguf = gguf_package()
    found = {x.name: x for x in gguf.GGUFReader(path).tensors if x.name != _ROPE_FREQS}
    tensors = _tensors(plan, layout)
    if sorted(found) != sorted(tensors.values()):
        return float("inf")
    worst = 0.0
    for key, name in tensors.items():
        value = _read(gguf, found[name])
        if tuple(value.shape) != plan.parts[key].info.shape:
            return float("inf")
        value = layout.separated(key.rpartition(".")[0], value)
        worst = max(worst, weight_difference(value, plan, plan.parts[key]))
    return worst


def _read(gguf: Any, tensor: Any) -> Tensor:
    """A tensor of a GGUF file in its own dtype."""
    dtypes = {gguf.GGMLQuantizationType[name]: dtype for dtype, (name, _) in _KINDS.items()}
    raw = torch.from_numpy(tensor.data.copy())
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return raw.reshape(-1).view(dtypes[tensor.tensor_type]).reshape(shape)
