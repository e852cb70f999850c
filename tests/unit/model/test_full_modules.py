"""Modules trained whole: in float32, with a copy for each client of a pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlora.model.client_rows import ClientRows, MixedRowsError, RowLayout, spans_of
from fedlora.model.full_modules import FullModule, full_modules_of, kinds_of, make_float32


def full(rows: ClientRows) -> tuple[nn.Linear, FullModule]:
    """A linear layer for two clients: one doubles, the other negates."""
    module = nn.Linear(3, 3, bias=False)
    wrapped = FullModule(module, rows)
    wrapped.load_copies("head", [{"head.weight": 2 * torch.eye(3)}, {"head.weight": -torch.eye(3)}])
    wrapped.inputs = wrapped.outputs = {(2,): (RowLayout(0),)}
    return module, wrapped


def test_every_clients_rows_go_through_its_copy_and_train_it() -> None:
    rows = ClientRows()
    module, wrapped = full(rows)
    x = torch.randn(5, 3)
    with rows.divided(tokens=spans_of([2, 3])):
        out = module(x)
    assert torch.equal(out, torch.cat([2 * x[:2], -x[2:]]))
    out.sum().backward()
    gradients = [copy["weight"].grad for copy in wrapped.copies]
    for gradient, part in zip(gradients, (x[:2], x[2:]), strict=True):
        torch.testing.assert_close(gradient, part.sum(0).expand(3, 3))
    assert module.weight.grad is None


def test_one_client_alone_and_nobody() -> None:
    rows = ClientRows()
    module, _ = full(rows)
    x = torch.randn(5, 3)
    with rows.only(1):
        assert torch.equal(module(x), -x)
    with rows.without_clients():
        assert torch.equal(module(x), x @ module.weight.T)


def test_what_a_client_brings_no_value_for_starts_as_the_module_is() -> None:
    module = nn.Linear(3, 2)
    wrapped = FullModule(module, ClientRows())
    wrapped.load_copies("head", [{"head.bias": torch.ones(2)}])
    assert torch.equal(wrapped.copies[0]["weight"], module.weight)
    assert torch.equal(wrapped.copies[0]["bias"], torch.ones(2))
    with torch.no_grad():
        wrapped.copies[0]["weight"].zero_()
    assert module.weight.any()


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    rows = ClientRows()
    module, wrapped = full(rows)
    with pytest.raises(MixedRowsError, match="Linear got rows that cannot be told apart"):
        module(torch.randn(5, 3))  # of how many tokens is not known
    wrapped.inputs = {}
    with rows.divided(tokens=spans_of([2, 3])), pytest.raises(MixedRowsError):
        module(torch.randn(5, 3))


def test_half_precision_is_widened_inside() -> None:
    module = nn.Linear(3, 2).bfloat16()
    make_float32(module, keep_output=False)
    assert module.weight.dtype == torch.float32
    assert module(torch.randn(4, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    head = nn.Linear(3, 2).half()
    make_float32(head, keep_output=True)
    assert head(torch.randn(4, 3).half()).dtype == torch.float32


def test_full_modules_are_found_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wrapped = FullModule(model[1], ClientRows())
    assert full_modules_of(model) == [wrapped]
    assert kinds_of([torch.ones(2, 2), None, 3]) == (2, None, None)
