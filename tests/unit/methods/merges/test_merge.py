"""What all merges share: the table, their options, and what is kept of a core."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from fedlora.config.checks import check_method
from fedlora.config.config import Config
from fedlora.methods import METHODS
from fedlora.methods.merges import MERGES
from fedlora.methods.merges.merge import Cores, largest


def test_names_are_those_of_no_rule() -> None:
    assert not MERGES.keys() & METHODS.keys()
    assert all(name == merge.name for name, merge in MERGES.items())
    assert {name for name, merge in MERGES.items() if merge.same_as_dense} == {"tsv"}


@pytest.mark.parametrize("name", MERGES)
def test_options_out_of_bounds_are_refused(name: str) -> None:
    merge = MERGES[name]
    for option in fields(merge.options):
        with pytest.raises(ValueError, match=f"^{option.name}: "):
            merge.options(**{option.name: -1})


@pytest.mark.parametrize("name", MERGES)
def test_a_run_says_that_it_is_no_rule_of_rounds(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}' merges adapters on disk.*no rule"):
        check_method(Config.model_construct(method=name))


def test_the_largest_numbers_of_every_core_stay() -> None:
    cores = torch.tensor([[[1.0, -4.0], [2.0, 3.0]], [[0.0, 0.1], [-0.3, 0.2]]])
    kept = largest(cores, 0.5)
    assert kept[0].tolist() == [[0.0, -4.0], [0.0, 3.0]]
    assert (kept[1] != 0).tolist() == [[False, False], [True, True]]
    assert (largest(cores, 0.01) != 0).sum(dim=(1, 2)).tolist() == [1, 1]
    assert torch.equal(largest(cores, 1.0), cores)


def test_weighted_cores() -> None:
    cores = Cores(torch.ones(2, 1, 3), torch.tensor([2.0, -1.0]), False, (4, 5), "a", (0, 1))
    assert cores.weighted[:, 0, 0].tolist() == [2.0, -1.0]
