"""Adapter layers over a frozen base, against PEFT's layers and plain linear algebra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import fedlora
from fedlora.lowrank import Delta, Dense, LowRank, to_dense, unfold
from fedlora.model.base import BaseModel
from fedlora.model.fingerprint import weights_fingerprint
from fedlora.model.lora_layer import AdapterLayer
from support.models import give, load_base


def lowrank(m: int, n: int, rank: int, seed: int, size: float = 0.3) -> LowRank:
    """Normal factors of a fixed seed."""
    rng = torch.Generator().manual_seed(seed)
    return LowRank(
        size * torch.randn(rank, n, generator=rng), size * torch.randn(m, rank, generator=rng)
    )


def over_all(
    base: BaseModel, rank: int, seed: int, size: float = 0.3, dense: bool = False
) -> dict[str, Any]:
    """A random update of every target module."""
    out: dict[str, Delta] = {}
    for i, (name, (m, n)) in enumerate(base.targets.shapes.items()):
        x = lowrank(m, n, rank, seed + i, size)
        out[name] = Dense(to_dense(x)) if dense else x
    return out


def ids() -> Tensor:
    """Two sequences of 12 tokens."""
    return torch.randint(4, 99, (2, 12), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> Tensor:
    """Of `ids`, dropout off."""
    model.eval()
    with torch.no_grad():
        out: Tensor = model(input_ids=ids()).logits
    return out


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def base_path(request: pytest.FixtureRequest) -> Path:
    """Both shapes of model: linear layers, and GPT-2's transposed ones."""
    path: Path = request.getfixturevalue(request.param)
    return path


def linear(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer from 6 to 4 features, with a bias where its kind has one."""
    torch.manual_seed(1)
    layer: nn.Module
    if kind == "conv1d":
        layer = Conv1D(4, 6)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    else:
        layer = nn.Linear(6, 4, bias=kind == "bias")
    return layer.to(dtype).requires_grad_(False)


def weight_of(layer: nn.Module) -> Tensor:
    """`W (m, n)` in float64."""
    w: Tensor = layer.weight.detach().double()  # type: ignore[union-attr,operator,assignment]
    return w.T if isinstance(layer, Conv1D) else w


def by_hand(layer: nn.Module, x: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """`(W + sum dW) x + bias` in float64."""
    y = x.double() @ (weight_of(layer) + sum(d.double() for d in deltas)).T
    bias = getattr(layer, "bias", None)
    return y if bias is None else y + bias.detach().double()


FROZEN: dict[str, list[Delta]] = {
    "none": [],
    "factors": [lowrank(4, 6, 1, 1)],
    "factors of several": [lowrank(4, 6, 1, 1), lowrank(4, 6, 2, 2)],
    "dense": [Dense(to_dense(lowrank(4, 6, 3, 3)))],
    "both": [lowrank(4, 6, 1, 1), Dense(to_dense(lowrank(4, 6, 3, 3)))],
    "rank 0": [lowrank(4, 6, 0, 1)],
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d"])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_a_layer_is_the_sum_of_its_parts(
    kind: str, frozen: list[Delta], shape: tuple[int, ...]
) -> None:
    layer = AdapterLayer(linear(kind))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    trained = lowrank(4, 6, 2, 9)
    give(layer, frozen, trained, scale=0.5, dropout=0.0)
    wanted = by_hand(layer.base, x, [to_dense(d) for d in [*frozen, trained]])
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-6)
    give(layer, frozen, None, scale=1.0, dropout=0.0)
    wanted = by_hand(layer.base, x, [torch.zeros(4, 6), *(to_dense(d) for d in frozen)])
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-6)


def test_factors_of_small_rank_stay_factors_beside_half_precision() -> None:
    """A branch of factors, and one of a matrix: both paths of the forward pass."""
    wide = nn.Linear(40, 30, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    frozen: list[Delta] = [lowrank(30, 40, 3, 1)]
    for part in (frozen[0], Dense(to_dense(frozen[0]))):
        layer = AdapterLayer(wide)
        give(layer, [part], None, scale=1.0, dropout=0.0)
        assert type(layer.branch) is type(part)
        assert layer.merged is None
        wanted = by_hand(wide, x, [to_dense(frozen[0])])
        torch.testing.assert_close(layer(x).double(), wanted, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", ["no bias", "conv1d"])
def test_half_precision_does_not_round_small_updates_away(kind: str, dense: bool) -> None:
    """Beside weights of 1, bfloat16 knows no 1.001: what is merged there is lost."""
    base = linear(kind, torch.bfloat16)
    with torch.no_grad():
        base.weight.fill_(1.0)  # type: ignore[union-attr,operator]
        if kind == "conv1d":
            base.bias.zero_()  # type: ignore[union-attr,operator]
    small = LowRank(torch.eye(6)[:1], torch.full((4, 1), 1e-3))
    assert torch.equal(weight_of(base).bfloat16() + to_dense(small).bfloat16(), torch.ones(4, 6))
    x = torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    assert not base(x).any()  # the base's own answer cancels, so the update's is all there is
    layer = AdapterLayer(base)
    give(layer, [Dense(to_dense(small)) if dense else small], None, scale=1.0, dropout=0.0)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), torch.full((1, 4), 1e-3), rtol=4e-3, atol=0.0)
    give(layer, [], small, scale=0.125, dropout=0.0)
    torch.testing.assert_close(layer(x).float(), torch.full((1, 4), 1e-3), rtol=4e-3, atol=0.0)


def test_the_trained_factors_are_copies() -> None:
    trained = lowrank(4, 6, 2, 9)
    before = trained.A.clone(), trained.B.clone()
    for scale in (1.0, 0.5):
        layer = AdapterLayer(linear("bias"))
        give(layer, [], trained, scale=scale, dropout=0.0)
        assert layer.A is not None
        assert layer.B is not None
        with torch.no_grad():
            layer.A.add_(1.0)
            layer.B.add_(1.0)
        assert torch.equal(trained.A, before[0])
        assert torch.equal(trained.B, before[1])


def test_dropout_acts_on_the_input_of_the_trained_side_and_only_while_training() -> None:
    layer = AdapterLayer(linear("bias"))
    frozen, trained = lowrank(4, 6, 1, 1), lowrank(4, 6, 2, 9)
    give(layer, [frozen], trained, scale=2.0, dropout=0.5)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    layer.train()
    torch.manual_seed(7)
    dropped = torch.nn.functional.dropout(x, 0.5, True)
    torch.manual_seed(7)
    wanted = (
        by_hand(layer.base, x, [to_dense(frozen)]) + dropped.double() @ to_dense(trained).double().T
    )
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-6)
    layer.eval()
    whole = by_hand(layer.base, x, [to_dense(frozen), to_dense(trained)])
    torch.testing.assert_close(layer(x).double(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_gradients_are_those_of_peft(base_path: Path, dtype: str) -> None:
    """PEFT's own layers, beside a frozen update that PEFT holds merged in float32."""
    base = load_base(str(base_path), target_modules="all-linear", dtype=dtype)
    trained, frozen = over_all(base, 3, 10), over_all(base, 2, 50)
    scale = 2.0

    plain = AutoModelForCausalLM.from_pretrained(base_path, dtype=getattr(torch, dtype))
    if dtype == "float32":
        with torch.no_grad():
            for name, x in frozen.items():
                weight = plain.get_submodule(name).weight
                dense = to_dense(x)
                weight.add_(dense.T if isinstance(plain.get_submodule(name), Conv1D) else dense)
    else:
        frozen = {}  # PEFT would round it; the branch has tests of its own
    theirs = get_peft_model(
        plain,
        LoraConfig(
            r=3,
            lora_alpha=3 * scale,
            target_modules=list(base.targets.shapes),
            fan_in_fan_out=base.targets.fan_in_fan_out,
        ),
    )
    sides = {}
    for name, x in trained.items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        a, b = unfold(x, scale)
        layer.lora_A["default"].weight.data = a
        layer.lora_B["default"].weight.data = b
        sides[name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    base.load([frozen], trained, scale)
    close: dict[str, Any] = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.1, "atol": 0.1}
    )
    torch.testing.assert_close(logits(base.model), logits(theirs), **close)
    if dtype == "bfloat16":
        return
    for model in (base.model, theirs):
        model(input_ids=ids(), labels=ids()).loss.backward()
    for name, (a, b) in sides.items():
        layer = base.layers[name]
        assert layer.A is not None
        assert layer.B is not None
        torch.testing.assert_close(layer.A.grad, a.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.B.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_gradients_reach_the_factors_and_nothing_else(base_path: Path) -> None:
    base = load_base(str(base_path), target_modules="all-linear")
    assert not [n for n, p in base.model.named_parameters() if p.requires_grad]
    base.load([over_all(base, 2, 50)], over_all(base, 3, 10), 2.0)
    trainable = {n for n, p in base.model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.clients.0.{factor}" for name in base.layers for factor in "AB"}
    base.model(input_ids=ids(), labels=ids()).loss.backward()
    with_gradient = {n for n, p in base.model.named_parameters() if p.grad is not None}
    assert with_gradient == trainable
    base.load([over_all(base, 2, 50)])
    assert not [n for n, p in base.model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads_never_touch_the_base(base_path: Path, dtype: str) -> None:
    """Whatever was loaded before, an empty load gives back the base to the bit."""
    base = load_base(str(base_path), target_modules="all-linear", dtype=dtype)
    untouched = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    first = logits(base.model)
    kept = over_all(base, 4, 30)
    base.load([kept])
    once = logits(base.model)
    for i in range(5):
        base.load([over_all(base, 4, i), over_all(base, 2, i, dense=True)], over_all(base, 2, i))
        base.model(input_ids=ids(), labels=ids()).loss.backward()
    base.load([kept])
    assert torch.equal(logits(base.model), once)
    assert not torch.equal(once, first)
    base.load([])
    assert torch.equal(logits(base.model), first)
    after = dict(base.model.named_parameters())
    assert after.keys() == untouched.keys()
    assert all(torch.equal(after[n], p) for n, p in untouched.items())


def test_what_is_loaded_is_read_back(base_path: Path) -> None:
    base = load_base(str(base_path), target_modules="all-linear")
    trained = over_all(base, 3, 10)
    base.load([over_all(base, 2, 50)], trained, 2.0)
    back = base.read_adapter()
    assert list(back) == list(base.targets.shapes)
    for name, x in trained.items():  # a power of two, so that the scale folds without rounding
        assert torch.equal(back[name].A, x.A)
        assert torch.equal(back[name].B, x.B)
    with torch.no_grad():
        for layer in base.layers.values():
            assert layer.B is not None
            layer.B.zero_()
    assert all(x.B.any() for x in back.values())  # a copy, not a view of what trains on
    base.load([])
    with pytest.raises(ValueError, match="holds no adapter"):
        base.read_adapter()


def test_modules_a_frozen_update_does_not_name_stay_as_they_are(base_path: Path) -> None:
    base = load_base(str(base_path), target_modules="all-linear")
    name = next(iter(base.layers))
    base.load([{name: over_all(base, 2, 1)[name]}])
    assert [n for n, layer in base.layers.items() if layer.merged is not None] == [name]


def test_the_fingerprint_knows_the_weights(tiny_llama: Path, tiny_gpt2: Path) -> None:
    base = load_base(str(tiny_llama), target_modules=["q_proj"])
    again = load_base(str(tiny_llama), target_modules="all-linear")
    assert base.fingerprint == again.fingerprint
    assert base.fingerprint != load_base(str(tiny_gpt2), target_modules=None).fingerprint
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert weights_fingerprint(model) == base.fingerprint
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    assert weights_fingerprint(model) != base.fingerprint


def test_dtypes(tiny_llama: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        base = load_base(str(tiny_llama), target_modules="all-linear", dtype=dtype)
        assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)}
        base.load([], over_all(base, 2, 1))
        trained = [p for p in base.model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
    auto = load_base(str(tiny_llama), target_modules="all-linear", dtype="auto")
    assert {p.dtype for p in auto.model.parameters()} == {torch.float32}


def test_what_cannot_be_loaded_names_the_key(
    tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    with pytest.raises(fedlora.InputError, match=r"model_name_or_path: .*the model cannot be load"):
        load_base(str(tmp_path), target_modules=None)
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "bare")
    with pytest.raises(fedlora.InputError, match=r"model_name_or_path: .*tokenizer cannot be load"):
        load_base(str(tmp_path / "bare"), target_modules=None)
    with pytest.raises(fedlora.InputError, match=r"tokenizer_name: .*tokenizer cannot be loaded"):
        load_base(str(tiny_llama), target_modules=None, tokenizer_name=str(tmp_path))
    other = load_base(str(tmp_path / "bare"), target_modules=None, tokenizer_name=str(tiny_gpt2))
    assert other.tokenizer.pad_token_id == 0
    with pytest.raises(fedlora.InputError, match="lora_target_modules: 'nothing'"):
        load_base(str(tiny_llama), target_modules=["nothing"])


def test_a_tokenizer_that_does_not_belong_to_the_model_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "larger")
    with pytest.raises(fedlora.InputError, match="101 tokens, the model 100; they do not belong"):
        load_base(str(tiny_llama), target_modules=None, tokenizer_name=str(tmp_path / "larger"))


def test_a_tokenizer_without_padding_pads_with_its_end(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    base = load_base(
        str(tiny_llama), target_modules=None, tokenizer_name=str(tmp_path / "unpadded")
    )
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 2
