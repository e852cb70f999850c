"""Which architectures keep the samples of a packed pass apart, and what they give for each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from fedlora.data.tokenize import Tokens
from fedlora.model.batches import collate, count_labelled
from fedlora.model.passes import runner_of
from support.packing import (
    EXPERTS,
    MIXTURES,
    PACKED,
    ROPES,
    SIZES,
    WINDOWS,
    built,
    found,
    routed,
    rows_of,
    steps_of,
)


def alone(model: Any, rows: Sequence[Tokens]) -> list[Tensor]:
    """The oracle: each row through a fresh copy of the model, by itself."""
    out = []
    for row in rows:
        fresh = copy.deepcopy(model)
        with torch.no_grad():
            logits = fresh(input_ids=torch.tensor([row["input_ids"]])).logits[0].float()
        out.append(logits[None] if "label" in row else logits[:-1])
    return out


def same(model: Any, rows: Sequence[Tokens], bound: float = 1e-5) -> None:
    pristine = copy.deepcopy(model)
    for x, y in zip(found(model, rows), alone(pristine, rows), strict=True):
        assert float((x - y).abs().max()) <= bound * float(y.abs().max())


@pytest.mark.parametrize("longest", [0, 512])
@pytest.mark.parametrize("case", WINDOWS.values(), ids=WINDOWS.keys())
def test_a_window_longer_than_what_was_tried_is_kept(
    case: tuple[str, dict[str, Any], bool], longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, config, classify = case
    monkeypatch.setattr("fedlora.model.packed_attention.LONGEST_PRODUCT", longest)
    model = built(name, config, classify)
    assert runner_of(model).packed
    rows = rows_of([70, 7, 60, 100, 41], classify)
    same(model, rows)
    # And the window counts: without it the model gives something else.
    free = {k: v for k, v in config.items() if k not in ("sliding_window", "local_attention")}
    if name == "modernbert":
        free["local_attention"] = 512
    if name in ("mistral", "phimoe"):
        free["sliding_window"] = None
        other = built(name, free, classify)
        moved = [
            float((x - y).abs().max())
            for x, y in zip(alone(model, rows), alone(other, rows), strict=True)
        ]
        assert moved[0] > 1e-2
        assert moved[1] == 0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", ROPES.values(), ids=ROPES.keys())
def test_a_short_row_beside_a_long_one_keeps_its_rotary_factors(
    case: tuple[str, dict[str, Any]], packed: bool
) -> None:
    model = built(*case)
    passes = runner_of(model)
    assert passes.packed
    passes.packed = packed
    rows = rows_of([12, 50, 30, 31, 60, 20])
    same(model, rows)
    # Gradients as well: those of each row alone, added up.
    model.zero_grad()
    pristine = copy.deepcopy(model)
    done = passes.backward(model, [rows], [1.0])
    total = 0.0
    for row in rows:
        fresh = copy.deepcopy(pristine)
        ids = torch.tensor([row["input_ids"]])
        loss = torch.nn.functional.cross_entropy(
            fresh(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"
        )
        loss.backward()
        total += float(loss.detach())
        for p, q in zip(pristine.parameters(), fresh.parameters(), strict=True):
            if q.grad is not None:
                p.grad = q.grad if p.grad is None else p.grad + q.grad
    assert done.losses[0] == pytest.approx(total, rel=1e-5)
    for p, q in zip(model.parameters(), pristine.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-3, atol=1e-5 * max(1.0, float(q.grad.abs().max()))
            )


LEAKING: dict[str, tuple[str, dict[str, Any]]] = {
    "BLOOM": ("bloom", {"vocab_size": 100, "n_layer": 2, "n_head": 4}),
    "XGLM": (
        "xglm",
        {"vocab_size": 100, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    ),
    "OpenAI-GPT": ("openai-gpt", {"vocab_size": 100, "n_layer": 2, "n_head": 4}),
    "RoFormer": ("roformer", {**SIZES, "is_decoder": True}),
    "Jamba": (
        "jamba",
        {
            **EXPERTS,
            "num_experts": 2,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "RecurrentGemma": ("recurrent_gemma", {**SIZES, "num_hidden_layers": 3}),
    "LFM2": (
        "lfm2",
        {**SIZES, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    "Mamba": ("mamba", {**SIZES, "state_size": 4}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("name", LEAKING)
def test_what_mixes_samples_is_never_packed(name: str, width: int, dtype: torch.dtype) -> None:
    """Of random initialisation, where attention is nearly uniform and a leak small."""
    kind, config = LEAKING[name]
    config = {**config, "lru_width": width, "hidden_size": width}
    if kind in ("bloom", "openai-gpt"):
        config |= {"n_embd": width}
    if kind == "xglm":
        config |= {"d_model": width}
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.CONFIG_MAPPING[kind](**config)).to(dtype).eval()
    passes = runner_of(model)
    assert not passes.packed
    if dtype == torch.float32 and width == 32:
        same(model, rows_of([5, 30, 12, 31]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKED)
def test_what_keeps_samples_apart_stays_packed(name: str, dtype: torch.dtype) -> None:
    kind, config, classify = PACKED[name]
    model = built(kind, config, classify, dtype)
    passes = runner_of(model)
    assert passes.packed
    assert passes.joint
    assert next(model.parameters()).dtype == dtype
    assert steps_of(model, [rows_of([9, 70, 250], classify)] * 3) == 1
    if dtype == torch.float32:
        same(model, rows_of([5, 30, 24, 31], classify))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_auxiliary_loss_is_the_models_own(name: str, packed: bool) -> None:
    model = routed(name)
    rows = rows_of([9, 21, 14])
    passes = runner_of(model)
    assert passes.auxiliary == pytest.approx(0.05)
    if not packed:
        passes.packed = False
    elif not passes.packed:
        pytest.skip("this architecture is padded")
    model.zero_grad()
    done = passes.backward(model, [rows], [1 / count_labelled(rows)])
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batch = collate(rows)
    batch["labels"][batch["attention_mask"] == 0] = -100
    out = model(**batch)
    out.loss.backward()
    plain = float(out.loss) - 0.05 * float(out.aux_loss)
    assert done.losses[0] == pytest.approx(float(out.loss), rel=1e-5)
    assert abs(done.losses[0] - plain) > 1e-2
    for n, p in model.named_parameters():
        if p.grad is not None:
            bound = 1e-5 * max(float(p.grad.abs().max()), 1e-2)
            torch.testing.assert_close(got[n], p.grad, rtol=1e-3, atol=bound)
