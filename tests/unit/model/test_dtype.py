"""In which dtype the base is held."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from fedlora.model import dtype
from fedlora.model.dtype import SMALLEST, TOKENS, WORTH, resolve_dtype

CPU = torch.device("cpu")


def test_narrow_layers_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(width: int, kind: torch.dtype) -> float:
        raise AssertionError

    monkeypatch.setattr(dtype, "_seconds", never)
    chosen, why = resolve_dtype(LlamaConfig(hidden_size=SMALLEST - 64), CPU)
    assert chosen == torch.float32
    assert why == "layers 192 wide gain nothing from bfloat16"


@pytest.mark.parametrize(
    ("ratio", "chosen", "says"),
    [
        (3.0, torch.bfloat16, "a layer takes 1/3.0 of the time it takes in float32"),
        (1.4, torch.float32, "a layer in bfloat16 takes 0.7 times as long"),
        (0.8, torch.float32, "a layer in bfloat16 takes 1.2 times as long"),
        (0.5, torch.float32, "this CPU takes longer in bfloat16"),
    ],
)
def test_bfloat16_where_it_is_clearly_faster(
    ratio: float, chosen: torch.dtype, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def clock(width: int, kind: torch.dtype, tokens: int = TOKENS) -> float:
        measured.append((width, tokens))
        return ratio if kind == torch.float32 else 1.0

    monkeypatch.setattr(dtype, "_seconds", clock)
    config = LlamaConfig(hidden_size=512, num_attention_heads=8)
    assert resolve_dtype(config, CPU) == (chosen, says)
    small, layer = [(SMALLEST, 32)] * 2, [(512, TOKENS)] * 2
    assert measured == (small if ratio < 1 / WORTH else small + layer)


@pytest.mark.parametrize("knows", [True, False])
def test_a_gpu_is_taken_at_its_word(knows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: knows)
    chosen, why = resolve_dtype(LlamaConfig(), torch.device("cuda"))
    assert (chosen == torch.bfloat16) is knows
    assert "this GPU" in why
