"""A client's AdamW over one vector steps as transformers' Trainer's over many parameters."""

from __future__ import annotations

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from fedlora.client.local_training import LocalTraining
from fedlora.client.optimizer import FlatParameters, make_optimizer, undecayed_names
from support.packing import SIZES, built


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2, dtype=torch.float64))


def test_parameters_become_views_of_one_vector() -> None:
    layer = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    flat = FlatParameters([layer.weight, layer.bias])
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
    flat.value.add_(1)
    assert torch.equal(layer.bias, before["bias"] + 1)
    layer(torch.ones(1, 3)).sum().backward()
    assert flat.value.grad is not None
    assert flat.value.grad.tolist() == [1.0] * 8


def test_steps_are_those_of_adamw_with_a_group_for_each_kind() -> None:
    """Weight decay for weights alone, each dtype in a vector of its own."""
    training = LocalTraining(weight_decay=0.3, learning_rate=0.05, adam_beta1=0.8)
    one, other = small(), small()
    flats, ours = make_optimizer(list(one.named_parameters()), undecayed_names(one), training)
    assert sorted((str(f.value.dtype), f.value.numel()) for f in flats) == [
        ("torch.float32", 6 + 12), ("torch.float32", 24),
        ("torch.float64", 2), ("torch.float64", 12),
    ]  # fmt: skip
    decayed = [p for p in other.parameters() if p.ndim > 1]
    plain = [p for p in other.parameters() if p.ndim == 1]
    theirs = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}],
        lr=0.05,
        betas=(0.8, 0.999),
    )
    for step in range(5):
        for model, optimizer in ((one, ours), (other, theirs)):
            x = model[1](model[0](torch.full((2, 4), 0.1 * step)))
            loss = model[2](x.double()).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_what_does_not_decay_is_what_transformers_leaves_out() -> None:
    for kind in ("llama", "gpt2"):
        model = built(kind, SIZES)
        undecayed = undecayed_names(model)
        forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
        theirs = set(get_parameter_names(model, [nn.LayerNorm], forbidden))
        names = {name for name, _ in model.named_parameters()}  # tied weights have one name
        assert {name for name in names if not undecayed(name)} == theirs & names
