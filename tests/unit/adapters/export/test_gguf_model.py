"""Merged models as GGUF files: every tensor against `W + dW` in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from fedlora.adapters.export.checkpoint import Checkpoint
from fedlora.adapters.export.gguf_layout import layout_of
from fedlora.adapters.export.gguf_model import (
    largest_gguf_difference,
    rope_factors,
    write_gguf_model,
)
from fedlora.adapters.export.gguf_vocabulary import NORMAL, Vocabulary
from fedlora.adapters.export.merged import plan_merge
from fedlora.errors import InputError
from fedlora.lowrank import LowRank
from support.adapters import random_lowrank
from support.merging import made

SIZES: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "tied llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
}
VOCABULARY = Vocabulary("llama", "default", [f"t{i}" for i in range(20)], [NORMAL] * 20, [0.0] * 20)
SHAPES = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.1.self_attn.k_proj": (8, 16),
    "model.layers.1.mlp.down_proj": (16, 24),
}
DELTAS = {name: random_lowrank(shape, 2, i) for i, (name, shape) in enumerate(SHAPES.items())}


def merged(name: str, path: Path, dtype: torch.dtype, deltas: dict[str, LowRank]) -> Any:
    """A random model, the plan of its merge, and the file."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    tied = CONFIGS[name].tie_word_embeddings
    weights = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file({k: v.contiguous() for k, v in weights.items()}, path / "base.safetensors")
    checkpoint = Checkpoint(dict.fromkeys(weights, path / "base.safetensors"))
    plan = plan_merge(model, checkpoint, made({}), deltas, torch.float32)
    layout = layout_of(CONFIGS[name])
    file = path / "model.gguf"
    write_gguf_model(file, plan, layout, CONFIGS[name], VOCABULARY, dtype, "mine")
    return weights, plan, layout, file


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_weight_is_the_sum(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights, plan, layout, file = merged(name, tmp_path, dtype, DELTAS)
    found = {x.name: x for x in gguf.GGUFReader(file).tensors}
    names = layout.names()
    assert len(found) == len(weights)
    for key, weight in weights.items():
        module, _, end = key.rpartition(".")
        tensor = found[f"{names[module]}.{end}"]
        value = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).double()
        wanted = weight.double()
        if module in DELTAS and end == "weight":
            wanted = wanted + DELTAS[module].B.double() @ DELTAS[module].A.double()
        heads = {"q_proj": 4, "k_proj": 2}.get(module.rpartition(".")[2])
        if heads and "llama" in name:
            rows = wanted.shape[0]
            turned = wanted.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2)
            wanted = turned.reshape(wanted.shape)
        kept = dtype if value.ndim > 1 else torch.float32
        bound = 2 * torch.finfo(kept).eps * float(wanted.abs().max()) + 1e-12
        assert float((value - wanted).abs().max()) <= bound, key
    assert largest_gguf_difference(file, plan, layout) <= 1.0


def test_the_header_says_what_the_model_is(tmp_path: Path) -> None:
    file = merged("llama", tmp_path, torch.bfloat16, {})[-1]
    reader = gguf.GGUFReader(file)

    def said(key: str) -> Any:
        return reader.get_field(key).contents()

    assert said("general.type") == "model"
    assert said("general.file_type") == 32
    for key, value in (
        ("block_count", 2), ("embedding_length", 16), ("feed_forward_length", 24),
        ("context_length", 32), ("vocab_size", 20), ("attention.head_count", 4),
        ("attention.head_count_kv", 2), ("rope.dimension_count", 4), ("rope.freq_base", 10000.0),
    ):  # fmt: skip
        assert said(f"llama.{key}") == value, key
    assert said("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert said("tokenizer.ggml.tokens")[3] == "t3"


def test_a_wrong_weight_is_found(tmp_path: Path) -> None:
    _, plan, layout, file = merged("llama", tmp_path, torch.float32, DELTAS)
    _, other, _, _ = merged("llama", tmp_path, torch.float32, {})
    write_gguf_model(file, plan, layout, CONFIGS["llama"], VOCABULARY, torch.float32)
    assert largest_gguf_difference(file, other, layout) > 10


def test_llama_3_scales_its_frequencies() -> None:
    """As transformers computes them: its frequencies are the unscaled ones over the factors."""
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = LlamaConfig(**{**SIZES, "hidden_size": 128}, rope_parameters=rope)
    factors = rope_factors(config)
    assert factors is not None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(plain / factors, wanted)
    assert rope_factors(CONFIGS["llama"]) is None
    config.rope_parameters = {**rope, "rope_type": "yarn"}
    with pytest.raises(InputError, match="scaled by yarn are not known here"):
        rope_factors(config)
