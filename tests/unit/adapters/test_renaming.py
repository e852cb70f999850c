"""Names that transformers gave to modules since an adapter was saved."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from fedlora.adapters.renaming import any_layer, documented, module_names, renamer, split_name
from support.models import LLAMA


def llama() -> LlamaForCausalLM:
    """Llama without weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**LLAMA))


def test_a_name_is_split_at_its_layers_number() -> None:
    assert split_name("model.layers.3.mlp.up") == (("model", "layers"), ("3", "mlp", "up"))
    assert split_name("lm_head") == ((), ("lm_head",))
    assert any_layer("model.layers.31.experts.7.up") == "model.layers.0.experts.0.up"


def test_modules_and_parameters_are_known_whatever_their_layer() -> None:
    names = module_names(llama())
    assert {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj.weight"} <= names
    assert not any(".1." in name for name in names)


def test_a_name_of_the_inner_model_becomes_one_of_the_whole() -> None:
    rename = renamer(llama())
    assert rename("layers.1.self_attn.q_proj") == "model.layers.1.self_attn.q_proj"
    assert rename("model.layers.1.self_attn.q_proj") == "model.layers.1.self_attn.q_proj"
    assert rename("layers.1.self_attn.nothing") == "layers.1.self_attn.nothing"
    assert renamer(llama(), extra=["score"])("score") == "score"


def test_names_of_older_checkpoints_become_todays() -> None:
    text = {"model_type": "llama", **LLAMA}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 24}  # fmt: skip
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    old = "language_model.model.layers.0.self_attn.q_proj"
    assert renamer(model)(old) == "model.language_model.layers.0.self_attn.q_proj"


def test_bare_paths_document_nothing() -> None:
    """`layers` and `model.layers` are a text model's own: only the base says what they became."""
    assert not documented("layers.0.a", "model.layers.0.a")
    assert documented("language_model.model.norm", "model.language_model.norm")
    assert not documented("model.language_model.norm", "language_model.model.norm")
