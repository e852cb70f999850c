"""What each tensor of a PEFT directory is: a factor, a trained module, a weight of the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlora.adapters.contents import (
    holds,
    modules_to_save,
    same_weights,
    saved_whole,
    sort_weights,
    why_other_rank,
)
from fedlora.errors import InputError

HERE = Path("adapter")
LAYER = "base_model.model.layers.0.q"


def factors(rank: int = 2) -> dict[str, Tensor]:
    """Factors of one module, as PEFT writes them."""
    return {
        f"{LAYER}.lora_A.weight": torch.ones(rank, 3),
        f"{LAYER}.lora_B.weight": torch.ones(4, rank),
    }


def test_factors_trained_modules_and_weights_of_the_base() -> None:
    weights = {
        **factors(),
        "base_model.model.score.weight": torch.full((2, 3), 2.0),
        "base_model.model.embed.weight": torch.full((9, 3), 3.0),
    }
    held = sort_weights(HERE, {"modules_to_save": ["score"]}, weights)
    assert held.factors["layers.0.q"].keys() == {"A", "B"}
    assert {name: float(t[0, 0]) for name, t in held.dense.items()} == {"score.weight": 2.0}
    assert {name: float(t[0, 0]) for name, t in held.base.items()} == {"embed.weight": 3.0}
    assert held.embeddings == frozenset()


def test_a_classifiers_head_is_trained_without_being_named() -> None:
    weights = {**factors(), "base_model.model.score.weight": torch.ones(2, 3)}
    assert list(sort_weights(HERE, {"task_type": "SEQ_CLS"}, weights).dense) == ["score.weight"]
    assert list(sort_weights(HERE, {}, weights).base) == ["score.weight"]


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({}, "holds no LoRA factors"),
        ({f"{LAYER}.lora_A.weight": torch.ones(2, 3)}, "the factors of layers.0.q are incomplete"),
        ({**factors(), f"{LAYER}.lora_B.weight": torch.ones(4, 3)}, "incomplete or do not fit"),
        (
            {
                f"{LAYER}.lora_A.weight": torch.ones(2, 0),
                f"{LAYER}.lora_B.weight": torch.ones(4, 2),
            },
            "a factor of layers.0.q is empty. DeepSpeed",
        ),
        ({**factors(), f"{LAYER}.strange": torch.ones(1)}, "it is neither a factor of LoRA nor"),
    ],
)
def test_what_cannot_be_used_is_refused(weights: dict[str, Tensor], says: str) -> None:
    with pytest.raises(InputError) as error:
        sort_weights(HERE, {}, weights)
    assert says in str(error.value)


def test_a_module_to_save_without_weights_is_refused() -> None:
    with pytest.raises(InputError, match="modules_to_save names score, but there are no such"):
        sort_weights(HERE, {"modules_to_save": ["score"]}, factors())


def test_tied_weights_are_trained_where_the_configuration_ties_them() -> None:
    table = torch.arange(12.0).reshape(4, 3)
    weights = {
        **factors(),
        "base_model.model.embed.modules_to_save.default.weight": table,
        "base_model.model.lm_head.weight": table.clone(),
    }
    config = {"modules_to_save": ["embed"], "ensure_weight_tying": True}
    assert sort_weights(HERE, config, weights).dense.keys() == {"embed.weight", "lm_head.weight"}
    config = {"modules_to_save": ["embed"]}
    assert sort_weights(HERE, config, weights).dense.keys() == {"embed.weight"}


def test_names_of_modules_trained_whole() -> None:
    assert modules_to_save({"modules_to_save": "score"}) == ["score"]
    assert modules_to_save({}) == []
    # PEFT matches ends of names, and so finds DistilBERT's two layers by one of their names.
    assert saved_whole("pre_classifier.weight", ["classifier"])
    assert not saved_whole("classifier.weight", ["pre_classifier"])
    assert not holds({"score.weight": torch.ones(1)}, "classifier")


def test_equal_up_to_the_rounding_of_the_narrower_dtype() -> None:
    third = torch.tensor([1 / 3])
    assert same_weights(third, third.bfloat16())
    assert not same_weights(third, third + 1e-3)
    assert not same_weights(third, third.reshape(1, 1))


def test_a_multiple_of_the_rank_is_explained_by_experts() -> None:
    says = why_other_rank(16, 4, {"target_parameters": ["experts"]})
    assert says.startswith(": 4 times that, one adapter for each expert")
    assert why_other_rank(16, 4, {}) == ""
    assert why_other_rank(15, 4, {"target_parameters": ["experts"]}) == ""
