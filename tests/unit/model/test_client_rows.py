"""Rows that cannot be told apart, and dropout in a head that is computed in chunks.

tests/runs/test_rows_of_architectures.py tests that clients together end where each ends alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from fedlora.model.base import attach
from fedlora.model.client_rows import ClientRows
from fedlora.model.passes import runner_of
from fedlora.model.targets import find_targets
from support.client_rows import GROUPED, assert_alike, rows_of, trained


def test_what_cannot_be_found_out_trains_alone() -> None:
    """A module whose rows depend on the data: an expert that gets some of the tokens."""

    class Some(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = x[..., 0] > 0
            return x.index_put(torch.where(chosen), self.inner(x[chosen]))

    for whole in ([], ["inner"]):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**GROUPED))
        model.model.layers[0].mlp.act_fn = torch.nn.Sequential(model.model.layers[0].mlp.act_fn)
        model.model.layers[1].mlp = Some()
        names = ["model.layers.1.mlp.inner"] if whole else []
        targets = ["q_proj"] if whole else ["q_proj", "inner"]
        base = attach(model, None, find_targets(model, targets, "it", None, names, "CAUSAL_LM"))
        assert runner_of(base.model).packed
        assert not runner_of(base.model).joint


@pytest.mark.parametrize(
    "inner", [False, True], ids=["a target", "trained whole, with dropout inside"]
)
def test_a_heads_dropout_does_not_depend_on_its_chunks(
    inner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**GROUPED))
    model.config.use_cache = False
    whole = []
    if inner:
        model.lm_head = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(32, 60))
        whole = ["lm_head"]
    targets = ["q_proj"] if inner else ["q_proj", "lm_head"]
    base = attach(model, None, find_targets(model, targets, "it", None, whole, "CAUSAL_LM"))
    assert runner_of(base.model).joint
    data = [rows_of([90, 80, 70 + 9 * k, 30], k) for k in range(3)]
    monkeypatch.setattr("fedlora.model.client_rows.BLOCK", 32)
    drawn = list[torch.Tensor]()
    keep = ClientRows.keep

    def keeping(self: ClientRows, *given: Any) -> torch.Tensor:
        drawn.append(keep(self, *given))
        return drawn[-1]

    alone = trained(base, data, [[0], [1], [2]], dropout=0.3)
    monkeypatch.setattr("fedlora.model.head.CHUNK_NUMBERS", 64 * 60)
    assert_alike(trained(base, data, [[0, 1, 2]], dropout=0.3), alone, base.read_full_params())
    monkeypatch.setattr(ClientRows, "keep", keeping)
    one = trained(base, data[:1], [[0]], dropout=0.3)
    assert_alike(one, alone[:1], base.read_full_params())
    # No row of the head has the mask of another one.
    masks = torch.cat([x for x in drawn[2:] if x.shape[-1] == 32][1:])[: 90 // 2 + 40 + 35 + 15]
    assert len(masks.unique(dim=0)) == len(masks)
