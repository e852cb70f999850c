"""Errors that a user can mend: what code that calls fedlora may catch."""

from __future__ import annotations

import pytest

import fedlora
from fedlora.errors import CheckpointError, FedloraError, InputError


@pytest.mark.parametrize("kind", [InputError, CheckpointError])
def test_every_error_is_caught_by_the_common_base(kind: type[Exception]) -> None:
    with pytest.raises(FedloraError, match="mend it"):
        raise kind("mend it")


def test_wrong_input_is_a_value_error_and_a_bad_checkpoint_is_none() -> None:
    assert issubclass(InputError, ValueError)
    assert not issubclass(CheckpointError, ValueError)


def test_they_are_public_under_the_same_names() -> None:
    assert fedlora.FedloraError is FedloraError
    assert fedlora.InputError is InputError
    assert fedlora.CheckpointError is CheckpointError
