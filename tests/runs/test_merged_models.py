"""A merged model, as transformers loads it, is the adapter beside its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
)

from support.merged_models import (
    causal,
    merge,
    same_logits,
    tied_llama,  # noqa: F401
)
from support.merging import peft_saves

CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 5},
        "alpha_pattern": {"up_proj": 9},
    },
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding and output layer": {"target_modules": ["embed_tokens", "lm_head"]},
    "whole output layer": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "base carried along": {"target_modules": ["q_proj"], "save_embedding_layers": True},
    "base under the output layer": {
        "target_modules": ["lm_head"],
        "save_embedding_layers": True,
    },
    "whole norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_is_the_adapter_beside_its_base(
    case: str, tied: bool, tiny_llama: Path, tied_llama: Path, tmp_path: Path
) -> None:
    base = tied_llama if tied else tiny_llama
    adapter = peft_saves(tmp_path / "in", base, 3, r=3, lora_alpha=7, **CASES[case])
    made = merge(base, adapter, tmp_path / "out")
    assert made.untied == (tied and ("embedding" in case or "output layer" in case))
    wanted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    )
    same_logits(causal(tmp_path / "out"), wanted)
