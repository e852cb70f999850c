"""The modules that carry adapters, as PEFT chooses them."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from fedlora.errors import InputError
from fedlora.model.targets import Targets, find_targets, fused_experts
from support.packing import MIXTURES, SIZES, built


def chosen(wanted: Any, name: str = "llama", **more: Any) -> Targets:
    """The targets of a small model."""
    return find_targets(built(name, {**SIZES, **more}), wanted, "tiny")


@pytest.mark.parametrize(
    "wanted",
    [["q_proj"], ["q_proj", "layers.1.mlp.up_proj"], "all-linear", r".*layers\.1\..*_proj", None],
)
def test_they_are_those_of_peft(wanted: Any) -> None:
    model = get_peft_model(
        built("llama", SIZES), LoraConfig(target_modules=wanted, task_type="CAUSAL_LM")
    )
    names = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert chosen(wanted).shapes.keys() == names


def test_names_for_peft_are_short_where_they_are_exact() -> None:
    assert chosen(["q_proj"]).names == ["q_proj"]
    assert chosen(r".*layers\.1\..*q_proj").names == ["model.layers.1.self_attn.q_proj"]
    assert chosen(["v_proj"]).shapes["model.layers.0.self_attn.v_proj"] == (16, 32)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (["nothing"], "'nothing' matches no linear layer of tiny; it has q_proj, k_proj"),
        ("(", "is no regular expression"),
        (["norm"], "'norm' matches no linear layer"),
    ],
)
def test_what_matches_nothing(wanted: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        chosen(wanted)


def test_a_module_trained_whole_takes_no_adapter() -> None:
    model = built("llama", SIZES)
    with pytest.raises(InputError, match="'lm_head' is trained whole"):
        find_targets(model, ["lm_head"], "tiny", modules_to_save=["lm_head"])
    both = find_targets(model, ["q_proj", "lm_head"], "tiny")
    assert "lm_head" in both.shapes


def test_expert_weights_are_counted_and_refused() -> None:
    name, config = MIXTURES["mixtral"]
    model = built(name, config)
    fused = fused_experts(model)
    assert fused
    assert all(dict(model.named_parameters())[n].numel() == size for n, size in fused.items())
    end = next(iter(fused)).rpartition(".")[2]
    with pytest.raises(InputError, match="fused into one tensor for all experts"):
        find_targets(model, [end], "tiny")


def test_a_layer_that_can_carry_none_is_left_out_or_refused() -> None:
    class Router(nn.Linear):
        """Gives two tensors."""

        def forward(self, x: Any) -> Any:
            return super().forward(x), x

    model = built("llama", SIZES)
    model.router = Router(4, 4)
    targets = find_targets(model, "all-linear", "tiny")
    assert targets.left_out == {"router": "gives a tuple instead of one tensor"}
    assert "router" not in targets.shapes
    with pytest.raises(InputError, match=r"router gives a tuple .* so it can carry no adapter"):
        find_targets(model, ["router"], "tiny")


def test_names_that_other_modules_end_with_too_are_written_in_full() -> None:
    """PEFT matches the ends of all modules' names: "0" would also be `blocks.0`."""
    block = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(3, 3), nn.ReLU())})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    assert find_targets(model, "all-linear", "x").names == ["blocks.0.mlp.0"]
