"""Layers that are no plain `W x + b`, and models that use them in other ways than by calling them.

PEFT is the oracle: its layers where a layer is tried by itself, its merge in float64 for models.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from transformers.integrations.bitnet import AutoBitLinear
from transformers.pytorch_utils import Conv1D

from fedlora.errors import InputError
from fedlora.lowrank import LowRank, to_dense
from fedlora.model import checks, layers, loading
from fedlora.model.lora_layer import AdapterLayer
from fedlora.model.targets import find_targets
from support.layers import (
    ROUTERS,
    data,  # noqa: F401
    models,  # noqa: F401
)
from support.models import (
    give,
    load_base,
)


class OwnForward(nn.Linear):
    """Falcon's way."""

    def forward(self, input: Tensor) -> Tensor:
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Noisy(nn.Linear):
    """It is plain while it is not trained."""

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        return out * 2 if self.training else out


class Clipped(nn.Linear):
    """It is plain where nothing is large."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-1, 1))


class Widening(nn.Linear):
    """It computes in float32 whatever it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float(), self.bias.float())


class WithMore(nn.Linear):
    def forward(self, input: Tensor, factor: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return super().forward(input) * factor + shift


class OwnConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda module, given, out: out * 2)
    return layer


def hooked_before(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    return layer


def patched(layer: nn.Linear) -> nn.Linear:
    forward = layer.forward
    layer.forward = lambda x: forward(x) - 1
    return layer


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 8),
    "no_bias": lambda: nn.Linear(12, 8, bias=False),
    "inherited": lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(12, 8),
    "conv1d": lambda: Conv1D(8, 12),
    "own_forward": lambda: OwnForward(12, 8),
    "scaled": lambda: Scaled(12, 8),
    "noisy": lambda: Noisy(12, 8),
    "clipped": lambda: Clipped(12, 8),
    "more": lambda: WithMore(12, 8),
    "own_conv1d": lambda: OwnConv1D(8, 12),
    "hooked": lambda: hooked(nn.Linear(12, 8)),
    "hooked_before": lambda: hooked_before(nn.Linear(12, 8)),
    "patched": lambda: patched(nn.Linear(12, 8)),
    "weight_norm_hook": lambda: weight_norm(nn.Linear(12, 8)),
    "spectral_norm_hook": lambda: spectral_norm(nn.Linear(12, 8)).eval(),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(12, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(12, 8)),
    "ternary": lambda: AutoBitLinear(12, 8, bias=True),
}


PLAIN = ("linear", "no_bias", "inherited", "conv1d")


def layer_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]().requires_grad_(False)


def factors(seed: int, rank: int = 2) -> LowRank:
    source = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, 12, generator=source), torch.randn(8, rank, generator=source))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_added_to_what_any_layer_gives(kind: str, training: bool) -> None:
    """`y + x dW^T` with `y` of the layer itself, frozen and trained, and its gradients."""
    if kind == "spectral_norm_hook" and training:
        pytest.skip("every pass in training changes its weight")
    base, frozen, trained = layer_of(kind), factors(1), factors(2)
    layer = AdapterLayer(base).train(training)
    assert layer.plain == (kind in PLAIN)
    x = 3 * torch.randn(2, 5, 12, requires_grad=True)
    for shared in ([], [frozen]):
        for own in (None, trained):
            give(layer, shared, own, scale=0.5)
            change = sum((to_dense(d) for d in [*shared, own] if d is not None), torch.zeros(8, 12))
            y = layer_of(kind).train(training)(x)  # a layer of its own: some count their calls
            expected = y + x @ change.T
            found = layer(x)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            weight = torch.randn(found.shape)
            (ours,) = torch.autograd.grad((found * weight).sum(), x, retain_graph=True)
            (theirs,) = torch.autograd.grad((expected * weight).sum(), x)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            if own is not None:
                (db,) = torch.autograd.grad((found * weight).sum(), layer.B)
                low = (x @ layer.A.T).detach()
                torch.testing.assert_close(
                    db, 0.5 * torch.einsum("btm,btr->mr", weight, low), rtol=1e-4, atol=1e-4
                )


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"weight_norm", "orthogonal"}))
def test_peft_says_the_same_of_it(kind: str) -> None:
    update = factors(1)
    theirs = get_peft_model(
        nn.Sequential(layer_of(kind)),
        LoraConfig(r=2, lora_alpha=2, target_modules=["0"], fan_in_fan_out="conv1d" in kind),
    )
    inner = theirs.base_model.model[0]
    with torch.no_grad():
        inner.lora_A["default"].weight.copy_(update.A)
        inner.lora_B["default"].weight.copy_(update.B)
    layer = AdapterLayer(layer_of(kind))
    give(layer, [update], None)
    x = 3 * torch.randn(4, 12)
    torch.testing.assert_close(layer.eval()(x), theirs.eval()(x).detach(), rtol=1e-5, atol=1e-5)


def test_what_else_a_layer_is_given_goes_to_it() -> None:
    layer = AdapterLayer(layer_of("more"))
    give(layer, [factors(1)], factors(2))
    x = torch.randn(3, 12)
    expected = layer.base(x) * 2 + 5 + x @ (to_dense(factors(1)) + to_dense(factors(2))).T
    torch.testing.assert_close(layer(x, 2, shift=5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_layer_may_compute_in_another_dtype_than_it_is_given(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = AdapterLayer(Widening(12, 8).to(dtype).requires_grad_(False))
    give(layer, [factors(1)], factors(2))
    x = torch.randn(3, 12).to(dtype)
    change = to_dense(factors(1)) + to_dense(factors(2))
    expected = layer.base(x) + x.float() @ change.T
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.06)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_dry_run_without_weights_leaves_them_out_too(
    name: str, models: Callable[[str], Path]
) -> None:
    targets = load_base(str(models(name)), target_modules="all-linear", weights=False).targets
    assert (
        targets.shapes == load_base(str(models(name)), target_modules="all-linear").targets.shapes
    )
    assert targets.left_out


class Gate(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.seen = 0

    def forward(self, input: Tensor, second: Tensor) -> Any:
        return super().forward(input) + second, None


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[..., : self.out_features // 2]


class Flattening(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).reshape(-1, self.out_features)


def llama_with(path: Path, change: Callable[[Any], None], data: Path) -> Any:
    """What all-linear finds in a Llama that code of its own has changed."""
    model = hf.AutoModelForCausalLM.from_pretrained(path).requires_grad_(False)
    change(model)
    return find_targets(model, "all-linear", "it"), model


def other_class(kind: type[nn.Linear]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.__class__ = kind

    return change


@pytest.mark.parametrize("kind", [Halved, Flattening], ids=lambda kind: kind.__name__)
def test_layers_of_other_shapes_carry_none(kind: Any, tiny_llama: Path, data: Path) -> None:
    targets, _ = llama_with(tiny_llama, other_class(kind), data)
    assert list(targets.left_out) == ["model.layers.1.mlp.up_proj"]
    assert "makes (" in targets.left_out["model.layers.1.mlp.up_proj"]


def test_a_layer_that_takes_more_is_judged_by_a_pass_of_the_model(
    tiny_llama: Path, data: Path
) -> None:
    def change(model: Any) -> None:
        mlp = model.model.layers[0].mlp
        mlp.gate_proj.__class__ = Gate
        mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x, mlp.up_proj(x))[0])

    targets, _ = llama_with(tiny_llama, change, data)
    assert targets.left_out == {
        "model.layers.0.mlp.gate_proj": "gives a tuple instead of one tensor"
    }


def reads_past(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: F.linear(F.silu(mlp.up_proj(x)), mlp.down_proj.weight)


def reads_past_in_training(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: (
        x @ (mlp.down_proj.weight @ mlp.up_proj.weight) if mlp.training else own(x)
    )


def calls_past(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    kept = [mlp.down_proj]
    mlp.forward = lambda x: kept[0](F.silu(mlp.up_proj(x)))


def asks_for_dtype_and_shape(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    own = mlp.forward

    def forward(x: Tensor) -> Tensor:
        assert mlp.down_proj.in_features == mlp.down_proj.weight.shape[1]
        return own(x.to(mlp.down_proj.weight.dtype).to(mlp.down_proj.weight.device))

    mlp.forward = forward


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        (reads_past, {"down_proj": "read past"}),
        (reads_past_in_training, {"down_proj": "read past", "up_proj": "read past"}),
        (calls_past, {"down_proj": "called past"}),
        (asks_for_dtype_and_shape, {}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_weights_that_a_model_reads_past_their_layer_are_found(
    change: Any, left_out: dict[str, str], tiny_llama: Path, data: Path
) -> None:
    before = hf.AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    targets, model = llama_with(tiny_llama, change, data)
    assert {n.rpartition(".")[2] for n in targets.left_out} == set(left_out)
    assert all(".layers.1." in n for n in targets.left_out)
    for name, why in targets.left_out.items():
        assert left_out[name.rpartition(".")[2]] in why
    # What is watched is put back as it was.
    assert not any("_Watch" in type(m).__name__ for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(m.training for m in model.modules())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], x) for n, x in before.items())
    with_adapters = loading.attach(model, None, targets)
    checks.check_updates(with_adapters)


def test_the_weights_are_as_they_were_after_the_check(
    models: Callable[[str], Path], tiny_gpt2: Path
) -> None:
    for path in (models("falcon"), models("phimoe"), tiny_gpt2):
        base = load_base(str(path), target_modules="all-linear")
        plain = hf.AutoModelForCausalLM.from_pretrained(path).state_dict()
        found = {n.replace(".base.", "."): x for n, x in base.model.state_dict().items()}
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[n], x) for n, x in plain.items())
        assert all(not x.frozen and not len(x.clients) for x in base.layers.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lost", ["frozen", "trained", "sign", "fails"])
def test_a_layer_that_loses_an_update_is_found_and_named(
    lost: str, dtype: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers named up_proj lose what is frozen, or trained, or take it with another sign."""
    forward = AdapterLayer.forward

    def broken(self: AdapterLayer, x: Tensor, *given: Any) -> Tensor:
        if self.out_features != 48 or self.site % 2:  # up_proj of layer 0 among others
            return forward(self, x, *given)
        y = self.base(x)
        if lost == "fails" and (self.frozen or len(self.clients)):
            raise RuntimeError("it cannot be")
        if (lost == "frozen" and self.frozen) or (lost == "trained" and len(self.clients)):
            return y
        return 2 * y - forward(self, x, *given) if lost == "sign" else forward(self, x, *given)

    load_base(str(tiny_llama), target_modules="all-linear", dtype=dtype)
    monkeypatch.setattr(AdapterLayer, "forward", broken)
    with pytest.raises(InputError, match=r"lora_target_modules: .*(up|gate)_proj"):
        load_base(str(tiny_llama), target_modules="all-linear", dtype=dtype)


def test_plain_is_said_of_plain_layers_alone() -> None:
    for kind in KINDS:
        assert layers.is_plain(layer_of(kind)) == (kind in PLAIN), kind
