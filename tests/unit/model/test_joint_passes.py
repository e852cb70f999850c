"""Whether clients can share a pass: draws of torch's own generator, and rows that are found."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedlora.model.joint_passes import draws_nothing, locate_rows
from fedlora.model.passes import runner_of
from support.packing import SIZES, built, rows_of


class Noisy(nn.Module):
    """Adds noise of torch's own generator in training, as some routers do."""

    def forward(self, x: Any) -> Any:
        return x + torch.randn_like(x) if self.training else x


def test_a_model_that_draws_from_torchs_generator_is_found_out() -> None:
    model = built("llama", SIZES)
    forward, rows = runner_of(model).packed_forward, rows_of([4, 6])
    state = torch.get_rng_state()
    with torch.no_grad():
        assert draws_nothing(model, forward, rows)
        model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, Noisy())
        assert not draws_nothing(model, forward, rows)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws were taken
    assert not model.training


def test_rows_of_a_model_without_anything_to_tell_apart_are_known() -> None:
    model = built("llama", SIZES).train()
    forward = runner_of(model).packed_forward
    assert locate_rows(model, forward, lambda rows: forward.logits(model, rows))
    assert model.training
