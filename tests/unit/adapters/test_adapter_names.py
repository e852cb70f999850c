"""One module under several names, and names of two modules."""

from __future__ import annotations

import pytest

from fedlora.adapters.keys import read_keys, unwrapped
from fedlora.adapters.names import Twin, find_twins
from fedlora.adapters.renaming import documented
from support.merging import cli

__all__ = ["cli"]


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_what_transformers_documents() -> None:
    assert documented("language_model.model.layers.0.a", "model.language_model.layers.0.a")
    assert documented("vision_tower.a", "model.vision_tower.a")
    assert not documented("model.layers.0.a", "model.language_model.layers.0.a")
    assert not documented("encoder.layers.0.a", "decoder.layers.0.a")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model.layers.3.mlp.up_proj", "layers.3.mlp.up_proj"),
        ("model.layers.3.mlp.up_proj", "model.language_model.layers.3.mlp.up_proj"),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        ("bert.encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.query"),
        ("model.decoder.layers.0.fc1", "decoder.layers.0.fc1"),
        ("lm_head", "language_model.lm_head"),
        ("thinker.model.layers.0.x", "model.layers.0.x"),
    ],
)
def test_one_module_under_two_names(one: str, other: str) -> None:
    assert find_twins([{one: (4, 5)}, {other: (4, 5)}]) == [Twin(one, other)]
    assert find_twins([{one: (4, 5)}, {other: (4, 6)}]) == []  # two modules
    assert find_twins([{one: (4, 5), other: (4, 5)}]) == []  # one adapter has both
    assert find_twins([{one: (4, 5)}, {other: (4, 5)}, {one: (4, 5), other: (4, 5)}]) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.2.mlp.up_proj"),
        ("model.layers.3.mlp.up_proj", "model.layers.3.mlp.gate_proj"),
        ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"),
        ("model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"),
        ("vision_tower.layers.0.self_attn.q_proj", "language_model.layers.0.self_attn.q_proj"),
        ("model.visual.layers.0.q_proj", "model.layers.0.q_proj"),
        ("audio_tower.layers.0.q_proj", "model.layers.0.q_proj"),
        ("lm_head", "score"),
        ("a.dense", "b.dense"),
    ],
)
def test_two_modules(one: str, other: str) -> None:
    assert find_twins([{one: (4, 5)}, {other: (4, 5)}]) == []


def test_keys_one_by_one() -> None:
    assert unwrapped("_orig_mod.base_model.model.module.model.norm.weight") == "model.norm.weight"
    keys = read_keys(
        [
            "classifier.modules_to_save.dense.weight",
            "classifier.original_module.dense.weight",
            "base_model.model.a.lora_embedding_A",
            "base_model.model.b.lora_B.bias",
            "base_model.model.c.base_layer.weight",
        ]
    )
    found = [(key.kind, key.name, key.part) for key in keys.values()]
    assert found == [
        ("whole", "classifier.dense.weight", ""),
        ("original", "classifier.dense.weight", ""),
        ("lora", "a", "embedding_A"),
        ("lora", "b", "B.bias"),
        ("base", "c.weight", ""),
    ]
