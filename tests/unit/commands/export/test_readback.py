"""Reading back: differences are noticed, and what is the same passes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedlora.adapters.saved_adapter import load_adapter
from fedlora.commands.export.readback import (
    Check,
    enforce,
    load_export,
    logit_distance,
    logits_of,
    peft_distance,
    token_rows,
)
from fedlora.errors import CheckpointError
from fedlora.lowrank import LowRank, total_norm
from support.merging import causal, peft_saves


def test_distances_of_logits() -> None:
    wanted = torch.tensor([[1.0, -4.0]])
    assert logit_distance(wanted, wanted) == 0.0
    assert logit_distance(wanted + 0.4, wanted) == pytest.approx(0.1)
    assert logit_distance(wanted[:, :1], wanted) == float("inf")


def test_a_failed_comparison_is_an_error() -> None:
    good, info = Check("logits", 1e-6, 1e-4), Check("the cut", 0.5, None)
    enforce([good, info], Path("out"))
    for reached in (1e-3, float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match=r"out: .*logits: .*allowed: 1e-04.*Nothing was"):
            enforce([good, Check("logits", reached, 1e-4)], Path("out"))
    assert good.in_words == "logits: 1.0e-06 (allowed: 1e-04)"
    assert info.in_words == "the cut: 5.0e-01"


def test_the_same_rows_every_time(tiny_llama: Path) -> None:
    model = causal(tiny_llama)
    rows = token_rows(model)
    assert rows.shape == (4, 24)
    assert torch.equal(rows, token_rows(model))
    assert torch.equal(logits_of(model, rows), logits_of(model.train(), rows))


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gpt2"])
def test_what_peft_adds_is_compared_with_what_was_meant(
    base: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(base)
    options: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"]}
    if base == "tiny_gpt2":
        options = {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}
    first = peft_saves(tmp_path / "first", path, 0, **options)
    second = peft_saves(tmp_path / "second", path, 1, **options)
    peft = PeftModel.from_pretrained(causal(path), first)
    models: Any = SimpleNamespace(model=peft.base_model.model, peft=peft)
    load_export(models, second)
    deltas = load_adapter(second).deltas
    norm = total_norm(deltas)
    assert peft_distance(models.model, deltas, norm) < 1e-6
    name, x = next(iter(deltas.items()))
    wrong = {**deltas, name: LowRank(x.A, 1.01 * x.B)}
    assert peft_distance(models.model, wrong, norm) == pytest.approx(0.01, rel=0.02)
    assert peft_distance(models.model, deltas, norm, "absent") == float("inf")


def test_what_peft_cannot_load_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    first = peft_saves(tmp_path / "first", tiny_llama, target_modules=["q_proj"])
    peft = PeftModel.from_pretrained(causal(tiny_llama), first)
    models: Any = SimpleNamespace(model=peft.base_model.model, peft=peft)
    (tmp_path / "broken").mkdir()
    with pytest.raises(CheckpointError, match="PEFT cannot load what was written"):
        load_export(models, tmp_path / "broken")
