"""What adapters have in common: shapes, configuration, and modules under one name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.adapters.common import common_config, common_shapes, target_names, with_common_names
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError
from fedlora.lowrank import zeros


def adapter(*modules: str, shape: tuple[int, int] = (4, 3), **config: Any) -> SavedAdapter:
    """An adapter of these modules, all of one shape."""
    deltas = {name: zeros(shape, 1) for name in modules}
    return SavedAdapter(deltas, {}, {"target_modules": ["q", "v"], **config}, source="it")


def test_shapes_are_those_of_all_modules_together() -> None:
    assert common_shapes([adapter("a.q"), adapter("a.v")]) == {"a.q": (4, 3), "a.v": (4, 3)}
    with pytest.raises(InputError, match=r"a\.q: shapes \(4, 3\) and \(5, 3\)"):
        common_shapes([adapter("a.q"), adapter("a.q", shape=(5, 3))])


def test_an_embedding_is_no_linear_layer_of_the_same_shape() -> None:
    one, other = adapter("a.q"), adapter("a.q")
    table = SavedAdapter(other.deltas, {}, {}, embeddings=frozenset({"a.q"}))
    with pytest.raises(InputError, match="an embedding in one adapter and a linear layer in"):
        common_shapes([one, table])


def test_target_modules_are_kept_where_they_name_exactly_these_modules() -> None:
    assert target_names(adapter("a.q", "a.v")) == ["q", "v"]
    assert target_names(adapter("a.q")) is None  # v names nothing
    assert target_names(adapter("a.q", "a.v", "a.k")) is None  # k is named by nothing
    assert target_names(adapter("a.q", "a.v", target_modules="all-linear")) is None
    assert target_names(adapter("a.q", "a.v", layers_to_transform=[1])) is None


def test_the_configuration_of_several() -> None:
    one = adapter("a.q", target_modules=["q"], task_type="CAUSAL_LM")
    other = adapter("a.v", target_modules=["v"], fan_in_fan_out=True, modules_to_save=["score"])
    config = common_config([one, other])
    assert config["target_modules"] == ["q", "v"]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["fan_in_fan_out"] is True
    assert config["modules_to_save"] == ["score"]


def test_two_tasks_do_not_belong_together() -> None:
    with pytest.raises(InputError, match=r"^task_type: 'CAUSAL_LM' and 'SEQ_CLS'; these adapters"):
        common_config([adapter(task_type="CAUSAL_LM"), adapter(task_type="SEQ_CLS")])


def test_documented_renamings_become_one_name_everywhere() -> None:
    old, new = "language_model.model.layers.0.q", "model.language_model.layers.0.q"
    weight = f"{old.removesuffix('q')}norm.weight"
    first = SavedAdapter({old: zeros((4, 3), 1)}, {}, {}, base={weight: torch.ones(3)})
    renamed, same = with_common_names([first, adapter(new)])
    assert list(renamed.deltas) == list(same.deltas) == [new]
    assert list(renamed.base) == [weight]  # nothing says that it has another name elsewhere
