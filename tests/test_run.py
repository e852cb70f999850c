"""The main job from Python, end to end on tiny models."""

from __future__ import annotations

from typing import Any

import pytest

import fedlora


@pytest.mark.parametrize("method", ["fedit", "zero_pad", "flora", "exact"])
def test_every_method_learns(small_run: dict[str, Any], method: str) -> None:
    ranks = [4, 4, 4, 4] if method == "fedit" else small_run["client_ranks"]
    config = {**small_run, "method": method, "client_ranks": ranks, "max_steps": 10}
    result = fedlora.run(fedlora.Config.of(config))
    losses = [found["loss"] for _, found in sorted(result.evaluations.items())]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
