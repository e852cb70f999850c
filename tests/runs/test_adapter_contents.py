"""A run goes on from adapters with old names and with names that wrappers have changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)

import fedlora
from fedlora import InputError
from fedlora.adapters.saved_adapter import CONFIG_NAME, WEIGHTS_NAME
from support.adapter_contents import saved


def test_a_run_starts_from_old_and_wrapped_names(small_run: dict[str, Any], tmp_path: Path) -> None:
    """`init_adapter` reads what `aggregate` reads."""
    model = AutoModelForCausalLM.from_pretrained(small_run["model_name_or_path"])
    path = saved(tmp_path / "a", model, 1, target_modules=["q_proj", "v_proj"])
    keys = {**small_run, "lora_target_modules": ["q_proj", "v_proj"], "num_rounds": 1}
    keys |= {"init_adapter": str(path)}
    plain = fedlora.run(fedlora.Config(**keys)).evaluations
    tensors = load_file(path / WEIGHTS_NAME)
    save_file(
        {
            k.replace("base_model.model.", "base_model.model._orig_mod."): v
            for k, v in tensors.items()
        },
        path / WEIGHTS_NAME,
    )
    wrapped = fedlora.run(fedlora.Config(**keys | {"output_dir": str(tmp_path / "o2")})).evaluations
    assert wrapped == plain
    # Weights of the base that are its own do no harm; those of another are refused.
    save_file(
        {**tensors, "base_model.model.model.norm.weight": torch.ones(32)}, path / WEIGHTS_NAME
    )
    fedlora.run(fedlora.Config(**keys | {"output_dir": str(tmp_path / "o3")}))
    save_file(
        {**tensors, "base_model.model.lm_head.weight": torch.ones(104, 32)}, path / WEIGHTS_NAME
    )
    with pytest.raises(InputError, match=r"init_adapter: .* the base's weight lm_head\.weight"):
        fedlora.run(fedlora.Config(**keys | {"output_dir": str(tmp_path / "o4")}))
    assert json.loads((path / CONFIG_NAME).read_text())["r"] == 2
