"""The base model that a user brings: loaded, frozen, wrapped, or refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, GenerationConfig

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.model.loading import greedy, load_model, load_pretrained
from fedlora.model.quantised_linear import QuantisedLinear
from fedlora.model.sources import Source, find_source, load_tokenizer
from support.packing import SIZES, built


def loaded(path: Path, labels: tuple[str, ...] = (), weights: bool = True, **keys: Any) -> Any:
    """A model as a run loads it, and what is said of it."""
    source = find_source(str(path))
    tokenizer = load_tokenizer(source)
    return load_model(source, tokenizer, Config(**keys), labels, weights=weights)


def test_a_model_of_shapes_alone_has_no_memory(tiny_llama: Path) -> None:
    base, notes = loaded(tiny_llama, weights=False)
    assert all(p.is_meta for p in base.model.parameters())
    with_weights, _ = loaded(tiny_llama)
    assert base.targets.shapes == with_weights.targets.shapes
    assert notes == []


def test_shapes_of_a_quantised_base_need_no_bitsandbytes(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "bitsandbytes" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    base, _ = loaded(tiny_llama, weights=False, load_in_4bit=True)
    assert any(isinstance(layer, QuantisedLinear) for layer in base.model.modules())
    with pytest.raises(InputError, match=r"bitsandbytes, .* is not installed"):
        loaded(tiny_llama, load_in_4bit=True)


def test_a_classifiers_head_is_new_of_the_runs_seed_and_trained_whole(tiny_llama: Path) -> None:
    heads = []
    for seed in (1, 1, 2):
        base, _ = loaded(tiny_llama, ("no", "yes", "perhaps"), seed=seed)
        assert base.model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
        heads.append(base.full_params["score.weight"].detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert base.targets.task_type == "SEQ_CLS"
    assert base.targets.modules_to_save == ("score",)


def test_rows_of_a_head_follow_their_labels(tiny_llama: Path, tmp_path: Path) -> None:
    trained, _ = loaded(tiny_llama, ("no", "yes"))
    trained.model.config.id2label = {0: "no", 1: "yes"}
    own = built("llama", SIZES, classify=True)
    own.score = torch.nn.Linear(32, 2, bias=False)
    own.config.num_labels = 2
    own.config.id2label, own.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    own.save_pretrained(tmp_path)
    source = find_source(str(tmp_path))
    turned, missing = load_pretrained(source, "float32", 42, ("yes", "no"))
    assert torch.equal(turned.score.weight, own.score.weight[[1, 0]])
    assert missing == []


def test_modules_to_save_that_cannot_be(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'nothing' is no module of this model with parameters"):
        loaded(tiny_llama, lora_modules_to_save=["nothing"])
    base, _ = loaded(tiny_llama, lora_modules_to_save=["lm_head", "norm"])
    assert base.targets.modules_to_save == ("lm_head", "model.norm")
    tied = built("llama", {**SIZES, "tie_word_embeddings": True})
    tied.save_pretrained(tmp_path)
    source = find_source(str(tmp_path))
    tokenizer = load_tokenizer(find_source(str(tiny_llama)))
    config = Config(lora_modules_to_save=["lm_head"])
    with pytest.raises(InputError, match=r"is the same tensor as .* \(tied weights\)"):
        load_model(source, tokenizer, config)


def test_an_encoder_writes_no_text() -> None:
    source = Source("bert", BertConfig(), classifier=False)
    with pytest.raises(InputError, match=r"bert \(bert\) reads text in both directions"):
        load_pretrained(source, "float32", 42, (), weights=False)


def test_sampling_and_penalties_are_not_inherited() -> None:
    model = built("llama", SIZES)
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 5], do_sample=True, temperature=0.6, repetition_penalty=1.3
    )
    plain = greedy(model)
    assert plain.eos_token_id == [2, 5]
    assert not plain.do_sample
    assert plain.repetition_penalty in (None, 1.0)
