"""A known update has to act on the model as a change of its weights does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.errors import InputError
from fedlora.model.base import BaseModel, attach
from fedlora.model.checks import check_updates
from fedlora.model.targets import find_targets
from support.packing import SIZES, built


def base(dtype: torch.dtype = torch.float32) -> BaseModel:
    """A small Llama with adapter layers."""
    model = built("llama", SIZES, dtype=dtype)
    return attach(model, None, find_targets(model, ["q_proj", "up_proj"], "tiny"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_in_order_passes_and_is_as_before(dtype: torch.dtype) -> None:
    it = base(dtype)
    before = {name: value.clone() for name, value in it.model.state_dict().items()}
    check_updates(it)
    assert all(torch.equal(value, before[n]) for n, value in it.model.state_dict().items())
    assert all(not layer.frozen and not len(layer.clients) for layer in it.layers.values())


def test_a_model_that_reads_the_weight_past_its_layer_is_refused() -> None:
    it = base()
    attention = it.model.model.layers[0].self_attn
    layer = attention.q_proj
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.base.weight)
    with pytest.raises(InputError, match=r"an update of model\.layers\.0\.self_attn\.q_proj does"):
        check_updates(it)


def test_a_layer_that_fails_with_an_adapter_alone_is_refused() -> None:
    it = base()
    layer = it.layers["model.layers.0.mlp.up_proj"]
    plain = layer.forward

    def fails_with_clients(*given: Any, **named: Any) -> Any:
        if len(layer.clients):
            raise RuntimeError("no clients here")
        return plain(*given, **named)

    layer.forward = fails_with_clients  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"up_proj runs without an adapter and fails with one"):
        check_updates(it)


def test_a_model_that_does_not_run_on_token_ids_is_not_judged() -> None:
    it = base()

    def fails(*_: Any, **__: Any) -> None:
        raise TypeError("pixels are missing")

    it.model.forward = fails
    check_updates(it)
