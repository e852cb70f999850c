"""Clients whose rows meet in one pass end where each ends alone, in every architecture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf

from fedlora.model.base import BaseModel, attach
from fedlora.model.passes import runner_of
from fedlora.model.targets import find_targets
from support.client_rows import COMMON, GROUPED, assert_alike, rows_of, trained

EVEN = {**COMMON, "num_key_value_heads": 4}


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "hunyuan": (
        lambda: hf.HunYuanDenseV1Config(**GROUPED, head_dim=8),
        ("query_layernorm", "key_layernorm"),
    ),
    "hunyuan_moe": (
        lambda: hf.HunYuanMoEV1Config(**GROUPED, head_dim=8, num_experts=4, moe_topk=2),
        ("query_layernorm", "key_layernorm"),
    ),
    "gemma3": (
        lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=8),
        ("q_norm", "k_norm", "input_layernorm"),
    ),
    "qwen3": (lambda: hf.Qwen3Config(**GROUPED, head_dim=16), ("q_norm", "k_norm")),
    "qwen3_moe": (
        lambda: hf.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=16, num_experts=4),
        ("q_norm", "k_norm", "gate"),
    ),
    "exaone4": (lambda: hf.Exaone4Config(**GROUPED, sliding_window=8), ("q_norm", "k_norm")),
    "apertus": (lambda: hf.ApertusConfig(**GROUPED), ("q_norm", "k_norm")),
    "phi": (
        lambda: hf.PhiConfig(
            **EVEN, qk_layernorm=True, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0
        ),
        ("q_layernorm", "k_layernorm"),
    ),
    "stablelm": (
        lambda: hf.StableLmConfig(**GROUPED, qk_layernorm=True),
        ("q_layernorm", "k_layernorm"),
    ),
    "persimmon": (lambda: hf.PersimmonConfig(**COMMON), ("q_layernorm", "k_layernorm")),
    "olmo2": (lambda: hf.Olmo2Config(**GROUPED), ("q_norm", "k_norm")),
    "olmoe": (
        lambda: hf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
        ("q_norm", "k_norm"),
    ),
    "cohere": (lambda: hf.CohereConfig(**GROUPED, use_qk_norm=True), ("q_norm", "k_norm")),
    "glm4_moe": (
        lambda: hf.Glm4MoeConfig(
            **GROUPED, **EXPERTS, head_dim=8, use_qk_norm=True, n_routed_experts=4, n_group=1,
            topk_group=1, first_k_dense_replace=1,
        ),
        ("q_norm", "k_norm"),
    ),
    "dots1": (
        lambda: hf.Dots1Config(
            **GROUPED, **EXPERTS, head_dim=8, n_routed_experts=4, n_group=1, topk_group=1,
            first_k_dense_replace=1, n_shared_experts=1
        ),
        ("q_norm", "k_norm"),
    ),
    "deepseek_v3": (
        lambda: hf.DeepseekV3Config(
            **EVEN, **EXPERTS, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1,
            n_shared_experts=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=8,
        ),
        ("q_a_layernorm", "kv_a_layernorm"),
    ),
    "llama": (lambda: hf.LlamaConfig(**GROUPED), ("embed_tokens", "norm", "mlp")),
    "gpt2": (
        lambda: hf.GPT2Config(
            vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=128, pad_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        ),
        ("wpe", "ln_1", "wte"),
    ),
}  # fmt: skip


@cache
def base_of(name: str) -> BaseModel:
    """A random model, made once: `trained` leaves it as it found it. Some modules train whole."""
    make, own = MODELS[name]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(make())
    for parameter in model.parameters():  # norms that all hold ones would hide a mistake
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.config.use_cache = False
    whole = [n for n, m in model.named_modules() if n.rpartition(".")[2] in own]
    assert whole
    return attach(model, None, find_targets(model, "all-linear", name, None, whole, "CAUSAL_LM"))


LENGTHS: dict[str, list[list[int]]] = {
    "as many samples as heads": [[5, 7], [9, 4]],
    "as many samples as tokens of a client": [[4, 6, 3], [5, 5], [8]],
    "tokens equal heads, and their width": [[4], [4]],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("name", MODELS)
def test_together_is_alone(name: str, lengths: list[list[int]]) -> None:
    base = base_of(name)
    assert runner_of(base.model).joint
    data = [rows_of(part, k) for k, part in enumerate(lengths)]
    everybody = list(range(len(data)))
    alone = trained(base, data, [[k] for k in everybody])
    assert_alike(trained(base, data, [everybody]), alone, base.read_full_params())
