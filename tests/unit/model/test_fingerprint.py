"""A model's fingerprint tells other weights from the same ones."""

from __future__ import annotations

import torch
from torch import nn

from fedlora.model.fingerprint import weights_fingerprint


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))


def test_the_same_weights_have_the_same_fingerprint() -> None:
    one, other = weights_fingerprint(model()), weights_fingerprint(model())
    assert one == other
    assert len(one) == 64
    assert one != weights_fingerprint(model(1))


def test_one_changed_value_changes_it() -> None:
    changed = model()
    with torch.no_grad():
        changed.get_parameter("1.bias")[1] += 1
    assert weights_fingerprint(changed) != weights_fingerprint(model())


def test_the_shape_counts_even_where_the_values_do_not() -> None:
    flat, square = nn.ParameterDict(), nn.ParameterDict()
    flat["w"], square["w"] = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 2))
    assert weights_fingerprint(flat) != weights_fingerprint(square)


def test_what_is_skipped_and_what_is_not_loaded_does_not_count() -> None:
    changed = model()
    with torch.no_grad():
        changed.get_parameter("1.bias").fill_(9)
    skip = {"1.bias"}
    assert weights_fingerprint(changed, skip) == weights_fingerprint(model(), skip)
    part = model()
    part.get_submodule("1").to("meta")
    assert weights_fingerprint(part) == weights_fingerprint(model(), {"1.weight", "1.bias"})


def test_half_precision_of_equal_values_is_the_same_model() -> None:
    rounded = model().to(torch.bfloat16)
    assert weights_fingerprint(rounded) == weights_fingerprint(rounded.float())
