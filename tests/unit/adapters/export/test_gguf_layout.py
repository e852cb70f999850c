"""llama.cpp's names and the order of its rows."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from fedlora.adapters.export.gguf_layout import Layout, gguf_package, layout_of, layout_of_file
from fedlora.errors import InputError

LLAMA = Layout("llama", 2, 4, 2, True)


def test_names_are_llama_cpps() -> None:
    names = LLAMA.names()
    assert names["model.embed_tokens"] == "token_embd"
    assert names["model.layers.1.self_attn.q_proj"] == "blk.1.attn_q"
    assert names["model.layers.0.mlp.down_proj"] == "blk.0.ffn_down"
    assert names["model.layers.0.post_attention_layernorm"] == "blk.0.ffn_norm"
    assert (names["model.norm"], names["lm_head"]) == ("output_norm", "output")
    assert "model.layers.0.self_attn.q_norm" not in names
    assert "model.layers.0.self_attn.q_norm" in Layout("qwen3", 1, 4, 2, False).names()
    assert len(set(names.values())) == len(names)


def _half_rotated(x: torch.Tensor, heads: int, angle: torch.Tensor) -> torch.Tensor:
    """transformers' rotation: number i of a head with number i + h/2."""
    x = x.reshape(heads, 2, -1)
    a, b = x[:, 0], x[:, 1]
    return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)


def _pair_rotated(x: torch.Tensor, heads: int, angle: torch.Tensor) -> torch.Tensor:
    """llama.cpp's rotation: neighbours with each other."""
    x = x.reshape(heads, -1, 2)
    a, b = x[..., 0], x[..., 1]
    return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@pytest.mark.parametrize(("module", "heads"), [("q_proj", 4), ("k_proj", 2)])
def test_interleaved_rows_give_the_same_attention(module: str, heads: int) -> None:
    """Inner products of heads are the same, whichever numbers are rotated with each other."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8 * heads, 5, generator=draw)
    inputs = torch.randn(2, 5, generator=draw)
    products = []
    for rows, rotate in (
        (weight, _half_rotated),
        (LLAMA.interleaved(f"model.layers.0.self_attn.{module}", weight), _pair_rotated),
    ):
        one, other = (
            rotate(rows @ x, heads, t * 0.7 ** torch.arange(4)).reshape(heads, -1)
            for x, t in zip(inputs, (3.0, 11.0), strict=True)
        )
        products.append((one * other).sum(1))
    torch.testing.assert_close(products[0], products[1])


def test_rows_are_put_back() -> None:
    for module in ("a.q_proj", "a.k_proj", "a.v_proj", "mlp.up_proj"):
        x = torch.arange(32 * 3.0).reshape(32, 3)
        assert torch.equal(LLAMA.separated(module, LLAMA.interleaved(module, x)), x)
        moved = not torch.equal(LLAMA.interleaved(module, x), x)
        assert moved == module.endswith(("q_proj", "k_proj"))
    qwen = Layout("qwen2", 2, 4, 2, False)
    assert qwen.interleaved("a.q_proj", x) is x


@pytest.mark.parametrize(
    ("config", "architecture", "interleaves"),
    [
        (LlamaConfig(num_attention_heads=4, num_key_value_heads=2), "llama", True),
        (MistralConfig(), "llama", True),
        (Qwen2Config(), "qwen2", False),
        (Qwen3Config(), "qwen3", False),
    ],
)
def test_of_a_model(config: object, architecture: str, interleaves: bool) -> None:
    layout = layout_of(config)
    assert (layout.architecture, layout.interleaves) == (architecture, interleaves)


def test_another_model_is_refused_with_the_way_round() -> None:
    with pytest.raises(InputError, match=r"gpt2: known here are llama.*convert_hf_to_gguf\.py"):
        layout_of(GPT2Config())


def test_of_a_file() -> None:
    names = ["blk.3.attn_q.weight.lora_a", "output.weight.lora_a"]
    layout = layout_of_file("llama", names, {"heads": 4})
    assert (layout.layers, layout.heads, layout.kv_heads) == (4, 4, 4)
    with pytest.raises(InputError, match=r"how many there are: put the base's config\.json"):
        layout_of_file("llama", names, {})
    assert layout_of_file("llama", names[1:], {}).layers == 0
    assert layout_of_file("qwen2", names, {}).interleaves is False
    with pytest.raises(InputError, match="architecture 'bert'; known here are llama"):
        layout_of_file("bert", names, {})


def test_the_package_is_there() -> None:
    assert math.isfinite(gguf_package().GGUF_VERSION)
