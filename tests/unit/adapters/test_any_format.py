"""Adapters of every format become the same update; others are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedlora import InputError, aggregate, save_adapter
from fedlora.adapters.any_format import load_adapter
from fedlora.adapters.export.gguf_adapter import write_gguf_adapter
from fedlora.adapters.export.gguf_layout import Layout
from fedlora.adapters.export.mlx import write_mlx
from fedlora.adapters.export.ranks import pad
from support.merging import effect, made, same_effect

SHAPES = {
    "model.layers.0.self_attn.q_proj": ((16, 12), 3),
    "model.layers.1.mlp.down_proj": ((12, 20), 1),
}
ADAPTER = made(SHAPES, base_model_name_or_path="base")
PADDED = {name: pad(x, 3) for name, x in ADAPTER.deltas.items()}


def loralib(path: Path, rank: int, alpha: float | None) -> Path:
    """The state dict that loralib.lora_state_dict gives, and what it does not say."""
    path.mkdir()
    tensors = {}
    for name, x in PADDED.items():
        scale = (alpha or rank) / rank
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = x.A, x.B / scale
    torch.save(tensors, path / "trained.pt")
    if alpha is not None:
        config = {"r": rank, "lora_alpha": alpha, "base_model_name_or_path": "base"}
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_every_format_is_the_same_update(tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft", ADAPTER)
    write_mlx(tmp_path / "mlx", PADDED, 2, "base")
    write_gguf_adapter(tmp_path / "x.gguf", PADDED, (), Layout("llama", 2, 4, 2, True))
    loralib(tmp_path / "loralib", 3, 12.0)
    paths = [tmp_path / name for name in ("peft", "mlx", "x.gguf", "loralib", "loralib/trained.pt")]
    found = [load_adapter(path) for path in paths]
    for adapter in found:
        same_effect(effect(adapter), effect(ADAPTER))
    assert [adapter.config.get("base_model_name_or_path") for adapter in found] == [
        "base", "base", None, "base", "base",
    ]  # fmt: skip
    together = aggregate(found)
    same_effect(effect(together), effect(ADAPTER))
    save_adapter(tmp_path / "out", together)


def test_a_directory_with_a_gguf_file_alone(tmp_path: Path) -> None:
    write_gguf_adapter(tmp_path / "adapter.gguf", PADDED, (), Layout("llama", 2, 4, 2, True))
    same_effect(effect(load_adapter(tmp_path)), effect(ADAPTER))
    (tmp_path / "model.gguf").write_bytes(b"")  # an export has both
    same_effect(effect(load_adapter(tmp_path)), effect(ADAPTER))


def test_an_mlx_adapter_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_mlx(tmp_path, PADDED, 2, "base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fine_tune_type": "dora"}))
    with pytest.raises(InputError, match=r"fine_tune_type is 'dora'.*mlx_lm\.fuse"):
        load_adapter(tmp_path)


def test_loralib_has_to_say_its_alpha(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"loralib's format, which does not say alpha.*\"r\": 8"):
        load_adapter(loralib(tmp_path / "x", 3, None))


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "kohya's format.*svd_merge_lora"),
        ("lora_te1_text_model.alpha", "kohya's format"),
        ("unet.down_blocks.0.attn.to_q.lora_A.weight", "diffusers' format.*set_adapters"),
        ("transformer.blocks.0.attn.to_q.lora.up.weight", "diffusers' format"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_adapters_of_image_models_are_refused_by_name(
    key: str, says: str, alone: bool, tmp_path: Path
) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({key: torch.ones(2, 2)}, file)
    with pytest.raises(InputError, match=says):
        load_adapter(file if alone else tmp_path)


def test_what_is_nothing_is_said_as_before(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no adapter_config\.json; expected a PEFT"):
        load_adapter(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds no adapter_config\.json; expected a PEFT"):
        load_adapter(tmp_path)
