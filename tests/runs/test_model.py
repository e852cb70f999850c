"""Models of transformers with our LoRA layers compute what PEFT's do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import fedlora
from fedlora.lowrank import Delta, Dense, to_dense, unfold
from fedlora.model.base import BaseModel
from fedlora.model.fingerprint import weights_fingerprint
from support.adapters import random_lowrank
from support.models import load_base


def over_all(
    base: BaseModel, rank: int, seed: int, size: float = 0.3, dense: bool = False
) -> dict[str, Any]:
    """A random update of every target module."""
    out: dict[str, Delta] = {}
    for i, (name, (m, n)) in enumerate(base.targets.shapes.items()):
        x = random_lowrank((m, n), rank, seed + i, size)
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
