"""A model is quantised layer by layer; what stays as it is, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.model.base import BaseModel
from fedlora.model.quantisation import (
    bits_of,
    note_on_saved_quantised,
    quantise,
    refuse_saved_quantised,
    saved_quantised,
)
from fedlora.model.quantised_linear import Bits
from support.extras import needs_bitsandbytes
from support.models import load_base
from support.quantised import assert_rounded, layers_of

CPU = torch.device("cpu")


def held(base: Path, bits: int, **keys: Any) -> BaseModel:
    out: BaseModel = load_base(
        str(base),
        target_modules="all-linear",
        dtype="float32",
        use_cpu=True,
        **{f"load_in_{bits}bit": True},
        **keys,
    )
    return out


@pytest.mark.parametrize(
    ("keys", "bits"), [({}, None), ({"load_in_8bit": True}, 8), ({"load_in_4bit": True}, 4)]
)
def test_the_configuration_says_the_bits(keys: dict[str, bool], bits: int | None) -> None:
    assert bits_of(Config(**keys)) == bits


def test_two_precisions_are_refused() -> None:
    with pytest.raises(InputError, match="load_in_8bit and load_in_4bit exclude each other"):
        Config(load_in_8bit=True, load_in_4bit=True)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
def test_linear_layers_are_quantised_and_nothing_else(tiny_llama: Path, bits: int) -> None:
    from transformers import AutoModelForCausalLM

    full = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    base = held(tiny_llama, bits)
    weights = dict(full.named_parameters())
    quantised = layers_of(base.model)
    assert set(quantised) == set(base.targets.shapes)
    for name, layer in quantised.items():
        assert_rounded(layer.weight, weights.pop(f"{name}.weight").detach(), bits)
    kept = dict(base.model.named_parameters())
    assert set(kept) == set(weights)
    assert all(torch.equal(kept[name], x) for name, x in weights.items())


@needs_bitsandbytes
def test_the_fingerprint_is_of_the_original_weights(tiny_llama: Path) -> None:
    full: BaseModel = load_base(
        str(tiny_llama), target_modules="all-linear", dtype="float32", use_cpu=True
    )
    for bits in (8, 4):
        base = held(tiny_llama, bits)
        assert base.fingerprint == full.fingerprint
        assert base.num_parameters == full.num_parameters
        assert base.targets == full.targets


@needs_bitsandbytes
def test_modules_that_are_trained_whole_stay_as_they_are(tiny_llama: Path) -> None:
    base = held(tiny_llama, 4, lora_modules_to_save=["layers.1.mlp"])
    assert not [name for name in layers_of(base.model) if "layers.1.mlp" in name]
    assert {p.dtype for p in base.full_params.values()} == {torch.float32}
    assert base.full_params


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
def test_transposed_layers_keep_their_meaning(tiny_gpt2: Path, bits: int) -> None:
    """GPT-2's Conv1D stores `(n, m)`; PEFT has to be told, whatever the base is held in."""
    from transformers import AutoModelForCausalLM

    full = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32)
    base = held(tiny_gpt2, bits)
    assert base.targets.fan_in_fan_out
    for name, layer in layers_of(base.model).items():
        assert_rounded(layer.weight, full.get_submodule(name).weight.detach().T, bits)


@needs_bitsandbytes
def test_the_rest_is_held_in_the_dtype_and_apart_from_the_file() -> None:
    class Model(nn.Module):
        _keep_in_fp32_modules = ("norm",)

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.up = nn.Embedding(4, 8), nn.LayerNorm(8), nn.Linear(8, 16)

    model = Model()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    quantise(model, "it", 8, torch.bfloat16, CPU)
    kept = dict(model.named_parameters())
    assert kept["embed.weight"].dtype == kept["up.bias"].dtype == torch.bfloat16
    assert kept["norm.weight"].dtype == torch.float32
    assert all(before[name] != p.data_ptr() for name, p in kept.items())
    assert model.up.weight.dtype == torch.bfloat16


@needs_bitsandbytes
def test_a_tensor_that_stands_in_two_places_is_not_quantised() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    quantise(model, "it", 4, torch.float32, CPU)
    assert list(layers_of(model)) == ["1"]
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_without_linear_layers_is_refused(bits: Bits) -> None:
    with pytest.raises(InputError, match=f"load_in_{bits}bit: it .Sequential. has no linear layer"):
        quantise(nn.Sequential(nn.Embedding(4, 8)), "it", bits, torch.float32, CPU)


SAVED = SimpleNamespace(quantization_config={"quant_method": "gptq", "bits": 4})


def test_what_was_saved_quantised_is_said_and_not_quantised_again() -> None:
    assert saved_quantised(SimpleNamespace()) == ""
    assert note_on_saved_quantised(SimpleNamespace(), "it") == []
    refuse_saved_quantised(SimpleNamespace(), "it", 4)
    (note,) = note_on_saved_quantised(SAVED, "it")
    assert "it was saved quantised (gptq), and its original weights are not there" in note
    with pytest.raises(InputError, match=r"load_in_4bit: it was saved quantised already \(gptq\)"):
        refuse_saved_quantised(SAVED, "it", 4)
