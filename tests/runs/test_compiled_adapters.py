"""An adapter that PEFT saved of a compiled model is read under the model's own names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from fedlora import load_adapter, save_adapter
from fedlora.adapters.saved_adapter import WEIGHTS_NAME
from support.adapter_names import llama, saved
from support.merging import (
    peft_effect,
    same_effect,
)


def test_a_compiled_model_that_peft_saved(tmp_path: Path) -> None:
    model = torch.compile(llama())
    path = saved(tmp_path / "a", model, 1)
    assert any("_orig_mod" in key for key in load_file(path / WEIGHTS_NAME))
    assert "model.layers.0.self_attn.q_proj" in load_adapter(path).deltas
    save_adapter(tmp_path / "out", load_adapter(path))
    wanted = {n: x.B.double() @ x.A.double() for n, x in load_adapter(path).deltas.items()}
    same_effect(peft_effect(llama(), tmp_path / "out"), wanted)
