"""A state of every rule is read back to the bit, round after round."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.methods import METHODS
from fedlora.runs.state_file import state_to_tensors
from support.checkpoint import assert_same
from support.saved_states import read, save, states


@pytest.mark.parametrize("method", METHODS)
def test_every_round_is_read_back_to_the_bit(method: str, tmp_path: Path) -> None:
    for state in states(method, 7, clients_per_round=3):
        found = read(save(tmp_path, state), state)
        assert_same(found, state)
        assert list(found.adapter) == list(state.adapter)
        assert list(found.changes) == list(state.changes)
        assert all(
            x.is_contiguous() and x.data_ptr() % 64 == 0 for x in state_to_tensors(found).values()
        )
