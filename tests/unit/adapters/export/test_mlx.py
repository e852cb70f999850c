"""MLX's files: what its layers would compute with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.adapters.export.mlx import CONFIG, WEIGHTS, read_mlx, write_mlx
from fedlora.errors import InputError
from fedlora.lowrank import to_dense
from support.adapters import random_lowrank

NAMES = {
    "model.layers.0.self_attn.q_proj": (6, 4),
    "model.layers.11.mlp.up_proj": (8, 4),
    "lm_head": (10, 4),
}
FACTORS = {name: random_lowrank(shape, 3, i) for i, (name, shape) in enumerate(NAMES.items())}


def test_factors_are_transposed_and_the_scale_is_a_factor(tmp_path: Path) -> None:
    write_mlx(tmp_path, FACTORS, 12, "some/base")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 12
    parameters = config["lora_parameters"]
    assert parameters["keys"] == ["lm_head", "mlp.up_proj", "self_attn.q_proj"]
    assert (parameters["rank"], parameters["scale"], parameters["dropout"]) == (3, 1.0, 0.0)
    tensors = load_file(tmp_path / WEIGHTS)
    for name, (m, n) in NAMES.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert (a.shape, b.shape) == ((n, 3), (3, m))
        x = torch.randn(5, n, generator=torch.Generator().manual_seed(0))
        # LoRALinear of mlx-lm: scale * (x @ lora_a) @ lora_b
        torch.testing.assert_close(parameters["scale"] * (x @ a) @ b, x @ to_dense(FACTORS[name]).T)


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    write_mlx(tmp_path, FACTORS, 12, "some/base")
    found = read_mlx(tmp_path, 12)
    assert found.keys() == FACTORS.keys()
    for name, x in FACTORS.items():
        assert torch.equal(found[name].A, x.A)
        assert torch.equal(found[name].B, x.B)


def test_the_reader_passes_over_what_mlx_passes_over(tmp_path: Path) -> None:
    write_mlx(tmp_path, FACTORS, 4, "some/base")  # its last four layers: 8 to 11
    assert read_mlx(tmp_path, 12).keys() == {"model.layers.11.mlp.up_proj", "lm_head"}
    config = json.loads((tmp_path / CONFIG).read_text())
    config["lora_parameters"]["keys"] = ["mlp.up_proj"]
    config["lora_parameters"]["scale"] = 2.0
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (name,) = found = read_mlx(tmp_path, 12)
    torch.testing.assert_close(to_dense(found[name]), 2 * to_dense(FACTORS[name]))


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one rank"):
        write_mlx(tmp_path, {**FACTORS, "x": random_lowrank((2, 2), 1, 0)}, 1, "")


def test_files_that_are_no_mlx_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no MLX adapter"):
        read_mlx(tmp_path, 1)
    write_mlx(tmp_path, FACTORS, 12, "")
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k: t for k, t in tensors.items() if k != "lm_head.lora_b"}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="lm_head are incomplete"):
        read_mlx(tmp_path, 12)
