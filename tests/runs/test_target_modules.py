"""Target modules of every architecture are those that PEFT chooses; expert weights are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft.utils import constants

import fedlora
from fedlora.model.loading import load_model
from fedlora.model.sources import find_source, load_tokenizer
from fedlora.model.targets import Targets
from support.architectures import (
    CASES,
    ENCODERS,
    LABELS,
    MIXTURES,
    adapted_by_peft,
    models,  # noqa: F401
    save_model,
)
from support.models import load_base


def names_of(name: str) -> list[str]:
    """Two names of linear layers; "dense" is also an end of names in heads and poolers."""
    found = {
        "gpt2": ["c_attn", "c_proj"],
        "gpt_neox": ["query_key_value", "dense"],
        "phi3": ["qkv_proj", "down_proj"],
        "bert": ["query", "dense"],
        "roberta": ["query", "dense"],
        "deberta": ["query_proj", "dense"],
        "distilbert": ["q_lin", "lin1"],
        "modernbert": ["Wqkv", "Wo"],
    }
    return found.get(name, ["q_proj", "o_proj"])


def targets_of(path: Path, classify: bool, wanted: Any = "all-linear") -> Targets:
    """What a run would train of this model."""
    config = fedlora.Config(
        model_name_or_path=str(path),
        label_column_name="label" if classify else None,
        lora_target_modules=wanted,
    )
    source = find_source(str(path))
    tokenizer = load_tokenizer(source, None)
    labels = LABELS if classify else ()
    return load_model(source, tokenizer, config, labels)[0].targets


@pytest.mark.parametrize("which", ["all-linear", "default", "names"])
@pytest.mark.parametrize(
    ("name", "classify"), CASES, ids=[n + ("-classifier" if c else "") for n, c in CASES]
)
def test_targets_are_those_peft_chooses(
    name: str, classify: bool, which: str, models: Callable[[str], Path]
) -> None:
    wanted: Any = {"all-linear": "all-linear", "default": None, "names": names_of(name)}[which]
    kind = hf.AutoModelForSequenceClassification if classify else hf.AutoModelForCausalLM
    config = hf.AutoConfig.from_pretrained(models(name))
    with torch.device("meta"):
        plain = kind.from_config(config)
    task = "SEQ_CLS" if classify else "CAUSAL_LM"
    whole: tuple[str, ...] = ()
    known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if which == "default" and plain.config.model_type not in known:
        with pytest.raises(fedlora.InputError, match="lora_target_modules: PEFT has no default"):
            targets_of(models(name), classify, wanted)
        with pytest.raises(ValueError, match="target_modules"):
            adapted_by_peft(plain, wanted, task, whole)
        return
    targets = targets_of(models(name), classify, wanted)
    if which == "default" and name in MIXTURES:  # of which PEFT 0.21 loses its own default
        wanted = list(known[name])
    whole = targets.modules_to_save
    theirs = adapted_by_peft(plain, wanted, task, whole)
    if name in MIXTURES:  # PEFT reaches routers and fused experts too, as parameters of modules
        theirs = {n for n in theirs if ".mlp." not in n}
    assert set(targets.shapes) == theirs
    heads = ("score", "classifier", "pre_classifier", "lm_head", "embed_out", "head")
    assert not [n for n in targets.shapes if n.split(".")[0] in heads]


def test_a_trained_pooler_gets_an_adapter_and_a_new_one_is_trained_whole(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Published BERTs have a pooler; PEFT adapts it, as any linear layer."""
    path = save_model(tmp_path / "bert", ENCODERS["bert"](), hf.BertModel)
    targets = targets_of(path, True)
    assert "bert.pooler.dense" in targets.shapes
    assert targets.modules_to_save == ("classifier",)
    config = hf.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        plain = hf.AutoModelForSequenceClassification.from_config(config)
    assert set(targets.shapes) == adapted_by_peft(plain, "all-linear", "SEQ_CLS", [])
    bare = targets_of(models("bert"), True)
    assert "bert.pooler.dense" not in bare.shapes
    assert set(bare.modules_to_save) == {"bert.pooler.dense", "classifier"}


@pytest.mark.parametrize("wanted", ["gate_up_proj", "down_proj", "experts.gate_up_proj"])
@pytest.mark.parametrize("name", MIXTURES)
def test_expert_weights_are_refused_as_targets(
    name: str, wanted: str, models: Callable[[str], Path]
) -> None:
    for asked in ([wanted], ["q_proj", wanted], wanted):
        with pytest.raises(
            fedlora.InputError, match=rf"lora_target_modules: .*'{wanted}'.*experts"
        ) as found:
            load_base(str(models(name)), target_modules=asked)
        assert "fused into one tensor" in str(found.value)
        assert "q_proj" in str(found.value)


def test_the_name_of_an_expert_weight_may_be_a_linear_layer_elsewhere(
    models: Callable[[str], Path],
) -> None:
    targets = load_base(str(models("phi3")), target_modules=["gate_up_proj"]).targets
    assert list(targets.shapes) == [f"model.layers.{i}.mlp.gate_up_proj" for i in (0, 1)]
