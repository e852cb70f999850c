"""Weights of the base that lie in adapters: carried where they agree, refused where they differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlora.adapters.base_weights import common_base_weights
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError


def adapter(source: str, fingerprint: str = "", **base: Tensor) -> SavedAdapter:
    """An adapter that holds nothing but weights of its base."""
    prints = {"norm.weight": fingerprint} if fingerprint else {}
    return SavedAdapter({}, {}, {}, base=base, fingerprints=prints, source=source)


def test_equal_weights_are_carried_in_the_widest_dtype() -> None:
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    half = table.half()
    weights, notes = common_base_weights([adapter("a", embed=half), adapter("b", embed=table)])
    assert weights["embed"].dtype == torch.float32
    assert torch.equal(weights["embed"], table)
    assert notes == ()


def test_a_weight_that_only_one_has_is_carried_and_said() -> None:
    weights, notes = common_base_weights([adapter("first"), adapter("second", embed=torch.ones(2))])
    assert torch.equal(weights["embed"], torch.ones(2))
    assert notes == ("embed, a weight of the base, is that of second",)


def test_rows_that_differ_are_counted() -> None:
    one = torch.zeros(4, 2)
    other = one.clone()
    other[1, 0] = other[3, 1] = 1.0
    with pytest.raises(InputError, match=r"^embed: a and b repeat .* 2 of its 4 rows differ"):
        common_base_weights([adapter("a", embed=one), adapter("b", embed=other)])


def test_vocabularies_of_other_sizes_are_named_as_the_cause() -> None:
    a, b = adapter("a", embed=torch.zeros(4, 2)), adapter("b", embed=torch.zeros(5, 2))
    with pytest.raises(InputError, match=r"\(4, 2\) and \(5, 2\).*resized to different sizes"):
        common_base_weights([a, b])


def test_fingerprints_tell_bases_apart_only_in_one_dtype() -> None:
    """Digests of another dtype cannot be compared, so they say nothing."""
    first = adapter("a", "torch.float32 (4,) aa")
    common_base_weights([first, adapter("b", "torch.float16 (4,) bb")])
    with pytest.raises(InputError, match=r"norm\.weight: .*different bases cannot be combined"):
        common_base_weights([first, adapter("b", "torch.float32 (4,) bb")])
