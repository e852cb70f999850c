"""Merging: what transformers loads afterwards is what PEFT computes beside the untouched base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from fedlora.adapters.export.checkpoint import open_checkpoint
from fedlora.adapters.export.merged import (
    largest_difference,
    plan_merge,
    refuse_quantised,
    write_merged,
)
from fedlora.adapters.saved_adapter import load_adapter
from fedlora.errors import InputError
from fedlora.lowrank import LowRank
from fedlora.model.loading import load_pretrained
from fedlora.model.sources import find_source
from support.merged_models import (
    causal,
    merge,
    plan,
    same_logits,
    tied_llama,  # noqa: F401
)
from support.merging import peft_saves


def test_weights_that_are_tied_and_trained_alike_stay_one(tied_llama: Path, tmp_path: Path) -> None:
    adapter = peft_saves(
        tmp_path / "in", tied_llama, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    (key,) = [k for k in tensors if "embed_tokens" in k]
    tensors["base_model.model.lm_head.weight"] = tensors[key].clone()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["modules_to_save"] = ["embed_tokens", "lm_head"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    made = merge(tied_llama, adapter, tmp_path / "out")
    assert not made.untied
    assert "lm_head.weight" not in made.parts
    found = causal(tmp_path / "out").get_output_embeddings().weight
    assert torch.equal(found, tensors[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_update_is_added_in_float32_and_rounded_once(
    dtype: torch.dtype, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = peft_saves(tmp_path / "in", tiny_llama, 1, r=4, target_modules=["q_proj"])
    merge(tiny_llama, adapter, tmp_path / "out", dtype)
    name = "model.layers.1.self_attn.q_proj"
    x = load_adapter(adapter).deltas[name]
    base = load_file(tiny_llama / "model.safetensors")[f"{name}.weight"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found[f"{name}.weight"], (base + x.B @ x.A).to(dtype))
    assert {value.dtype for value in found.values()} == {dtype}


def test_gpt2_whose_checkpoint_has_older_names(tiny_gpt2: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    tensors = load_file(tiny_gpt2 / "model.safetensors")
    tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    save_file(tensors, older / "model.safetensors", metadata={"format": "pt"})
    (older / "config.json").write_text((tiny_gpt2 / "config.json").read_text())
    options: Any = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapter = peft_saves(tmp_path / "in", tiny_gpt2, 2, **options)
    made = merge(older, adapter, tmp_path / "out")
    assert made.parts.keys() == tensors.keys()  # the names of the base's own checkpoint
    wanted = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32)
    same_logits(causal(tmp_path / "out"), PeftModel.from_pretrained(wanted, adapter))


def test_a_classifier_takes_the_trunk_of_a_language_model(tiny_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_llama, num_labels=3, dtype=torch.float32, pad_token_id=0
    )
    adapter = peft_saves(
        tmp_path / "in", base, 5, task_type="SEQ_CLS", target_modules=["q_proj", "down_proj"]
    )
    made = merge(tiny_llama, adapter, tmp_path / "out", labels=3)
    assert "lm_head.weight" not in made.parts
    assert made.parts["score.weight"].info.shape == (3, 32)
    found, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_llama, num_labels=3, dtype=torch.float32, pad_token_id=0
    )
    same_logits(found, PeftModel.from_pretrained(base, adapter))


def test_an_adapter_of_another_base_is_refused(
    tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    adapter = peft_saves(tmp_path / "in", tiny_llama, target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"q_proj: the adapter changes it, and the base has no"):
        plan(tiny_gpt2, adapter)
    source, held = find_source(str(tiny_llama)), load_adapter(adapter)
    skeleton, _ = load_pretrained(source, "float32", 0, (), weights=False)
    wrong = {name: LowRank(x.A[:, :-1], x.B) for name, x in held.deltas.items()}
    with pytest.raises(InputError, match=r"update is \(32, 31\), the base's weight \(32, 32\)"):
        plan_merge(skeleton, open_checkpoint(source), held, wrong, None)


def test_what_half_precision_cannot_hold_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = peft_saves(
        tmp_path / "in", tiny_llama, r=1, lora_alpha=10**7, target_modules=["q_proj"]
    )
    made = plan(tiny_llama, adapter, torch.float16)
    with pytest.raises(InputError, match="float16 cannot; give another --dtype"):
        write_merged(tmp_path, made, 10**9)


def test_a_spoilt_file_is_noticed(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = peft_saves(tmp_path / "in", tiny_llama, target_modules=["q_proj"])
    made = plan(tiny_llama, adapter)
    (file,) = files = write_merged(tmp_path, made, 10**9)
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name] + 1e-4}, file)
    assert largest_difference(files, made) > 10
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    assert largest_difference(files, made) == float("inf")


def test_a_quantised_base_is_refused_with_the_way_round_it(tiny_llama: Path) -> None:
    config = find_source(str(tiny_llama)).config
    refuse_quantised(config, "base")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(InputError, match=r"quantised \(gptq\).*unquantised model with --base"):
        refuse_quantised(config, "base")
