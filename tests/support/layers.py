"""Makes tiny models whose layers are no plain `W x + b`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from support.models import save_tokenizer
from support.rows import rows, write_jsonl

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}


MODELS: dict[str, Callable[[], Any]] = {
    "falcon": lambda: hf.FalconConfig(**SMALL, multi_query=False, parallel_attn=False, alibi=False),
    "falcon_new": lambda: hf.FalconConfig(
        **SMALL, new_decoder_architecture=True, num_kv_heads=2, bias=True
    ),
    "llama4": lambda: hf.Llama4TextConfig(**SMALL, **EXPERTS, intermediate_size_mlp=48, head_dim=8),
    "phimoe": lambda: hf.PhimoeConfig(**SMALL, **EXPERTS),
    "jamba": lambda: hf.JambaConfig(
        **SMALL,
        num_key_value_heads=2,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "bloom": lambda: hf.BloomConfig(
        vocab_size=100, hidden_size=32, n_layer=2, n_head=4, pretraining_tp=2, slow_but_exact=True
    ),
}


ROUTERS = ("llama4", "phimoe")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> a directory with a tiny random model, made on first use."""
    where = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        if not (where / name).is_dir():
            torch.manual_seed(0)
            hf.AutoModelForCausalLM.from_config(MODELS[name]()).save_pretrained(where / name)
            save_tokenizer(where / name)
        return where / name

    return get


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for site, number in enumerate((9, 6)):
        write_jsonl(path / f"text_{site}.jsonl", rows(number, 10 * site))
    write_jsonl(path / "eval.jsonl", rows(5, 1000))
    return path
