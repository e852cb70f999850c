"""PEFT directories in and out, against the formula of their scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.adapters.saved_adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    as_factors,
    load_adapter,
    write_adapter,
)
from fedlora.errors import InputError
from fedlora.lowrank import Dense, LowRank, to_dense
from fedlora.model.targets import Targets
from support.adapters import random_lowrank


def directory(path: Path, **config: Any) -> Path:
    """A module `a.q` with B = 1 (4, 2) and A = 1 (2, 3): every entry of B A is 2."""
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q"], **config}
    (path / CONFIG_NAME).write_text(json.dumps(values))
    prefix = "base_model.model.a.q.lora_"
    tensors = {f"{prefix}A.weight": torch.ones(2, 3), f"{prefix}B.weight": torch.ones(4, 2)}
    if values["peft_type"] == "ADALORA":
        tensors = {key.removesuffix(".weight"): value for key, value in tensors.items()}
        tensors[f"{prefix}E"] = torch.tensor([[3.0], [0.0]])
    save_file(tensors, path / WEIGHTS_NAME)
    return path


@pytest.mark.parametrize(
    ("config", "entry"),
    [
        ({}, 8 / 2 * 2),
        ({"use_rslora": True}, 8 / 2**0.5 * 2),
        ({"alpha_pattern": {"q": 1}}, 1 / 2 * 2),
        ({"r": 7, "rank_pattern": {"a.q": 2}}, 8 / 2 * 2),
        ({"peft_type": "ADALORA", "init_r": 4}, 8 / (4 + 1e-5) * 3),
    ],
)
def test_the_scale_is_folded_in(config: dict[str, Any], entry: float, tmp_path: Path) -> None:
    update = to_dense(load_adapter(directory(tmp_path, **config)).deltas["a.q"])
    torch.testing.assert_close(update, torch.full((4, 3), entry))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": 4}, r"a\.q has rank 2, its configuration says 4$"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern: no regular expression"),
    ],
)
def test_ranks_and_patterns_that_do_not_fit(
    config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        load_adapter(directory(tmp_path, **config))


def test_a_dense_update_is_its_own_factor() -> None:
    for shape in ((5, 3), (3, 5)):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        factors = as_factors(Dense(w))
        assert factors.rank == 3
        assert factors.A.dtype == torch.float32
        assert torch.equal(to_dense(factors), w.float())


def test_rank_zero_becomes_a_zero_of_rank_one() -> None:
    factors = as_factors(LowRank(torch.zeros(0, 3), torch.zeros(4, 0)))
    assert (factors.rank, float(to_dense(factors).abs().max())) == (1, 0.0)


def test_what_is_written_has_scale_one(tmp_path: Path) -> None:
    shapes = {"a.q": (4, 3), "a.v": (4, 3), "b.q": (4, 3)}
    targets = Targets(shapes=shapes, names=["q", "v"], fan_in_fan_out=False, model_name="")
    deltas = {name: random_lowrank(shapes[name], r, r) for name, r in (("a.q", 2), ("a.v", 5))}
    write_adapter(tmp_path / "new", deltas, targets, base={"a.q.bias": torch.ones(4)})
    config = json.loads((tmp_path / "new" / CONFIG_NAME).read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert "base_model.model.a.q.base_layer.bias" in load_file(tmp_path / "new" / WEIGHTS_NAME)
    back = load_adapter(tmp_path / "new")
    assert torch.equal(back.deltas["a.v"].B, deltas["a.v"].B)
    assert float(to_dense(back.deltas["b.q"]).abs().max()) == 0.0
    assert torch.equal(back.base["a.q.bias"], torch.ones(4))
