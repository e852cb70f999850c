"""What a key of a PEFT state dict names, whatever wrapped the model when it was saved."""

from __future__ import annotations

import pytest

from fedlora.adapters.keys import Key, read_keys, unwrapped
from fedlora.errors import InputError

PLAIN = "base_model.model.layers.0.q.lora_A.weight"


@pytest.mark.parametrize(
    "key",
    [
        PLAIN,
        f"module.{PLAIN}",
        f"_orig_mod.{PLAIN}",
        "base_model.model._fsdp_wrapped_module.layers.0.q.lora_A.weight",
        "base_model.model.layers._checkpoint_wrapped_module.0.q.lora_A.weight",
        f"module.module._orig_mod.{PLAIN}",
    ],
)
def test_wrappers_are_taken_off(key: str) -> None:
    assert unwrapped(key) == "layers.0.q.lora_A.weight"
    assert read_keys([key])[key] == Key("lora", "layers.0.q", "A", None)


def test_a_raw_state_dict_names_its_adapter() -> None:
    key = "base_model.model.layers.0.q.lora_B.mine.weight"
    assert read_keys([key])[key] == Key("lora", "layers.0.q", "B", "mine")


def test_whether_a_copys_key_names_the_adapter_is_seen_from_the_others() -> None:
    copy = "score.modules_to_save.dense.weight"
    alone = read_keys([copy])[copy]
    assert (alone.name, alone.adapter) == ("score.dense.weight", None)
    raw = read_keys([copy, "q.lora_A.dense.weight"])[copy]
    assert (raw.name, raw.adapter) == ("score.weight", "dense")


def test_two_adapters_in_one_state_dict_are_refused() -> None:
    with pytest.raises(InputError, match=r"several adapters \(a, b\); save one of them alone"):
        read_keys(["q.lora_A.a.weight", "q.lora_A.b.weight"])


def test_the_order_of_keys_is_kept() -> None:
    keys = ["b.lora_A.weight", "x.modules_to_save.weight", "a.weight", "a.base_layer.weight"]
    assert list(read_keys(keys)) == keys
