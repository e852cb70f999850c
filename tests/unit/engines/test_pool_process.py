"""What a pool sends and how its processes end; real ones are in tests/system/test_workers.py."""

from __future__ import annotations

import pytest
import torch

from fedlora.engines.pool_process import ending, with_stand_ins
from fedlora.federation.messages import Broadcast
from fedlora.lowrank import LowRank
from fedlora.methods.tracking import none_like
from fedlora.methods.values import RoundNumbers


@pytest.mark.parametrize(
    ("exitcode", "words"),
    [
        (-9, "was killed by signal 9 (memory ran out?)"),
        (-11, "was killed by signal 11"),
        (3, "has ended with exit code 3"),
        (None, "has ended with exit code None"),
    ],
)
def test_how_a_process_has_ended(exitcode: int | None, words: str) -> None:
    assert ending(exitcode) == words


def test_updates_that_are_merged_already_are_not_sent() -> None:
    """But for those that a client starts from, and of modules that each worker merges itself."""
    x, small, other = (LowRank(torch.ones(r, 4), torch.ones(3, r)) for r in (3, 1, 2))
    adapter, leading = {"q": x, "v": small}, {"q": other, "v": small}
    merge = {"q": x, "o": other}
    sent = Broadcast(2, 0, 2, adapter, leading, merge, {}, 7, RoundNumbers({"q": 2}, (2,)))
    stand_in = {"q": none_like(x), "v": none_like(x)}
    found = with_stand_ins(sent, stand_in, shared=True)
    assert found.base_delta == {"q": stand_in["q"], "o": other}
    assert found.adapter == {"q": stand_in["q"], "v": small}
    assert (found.leading, found.nbytes) == (leading, 7)
    assert with_stand_ins(sent, stand_in, shared=False).adapter is adapter
