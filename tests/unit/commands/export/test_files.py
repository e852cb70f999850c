"""What is written: one rank where readers want it, MLX's files, and what a failed check says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.adapters.export.ranks import spectrum
from fedlora.adapters.saved_adapter import load_adapter
from fedlora.commands.export.files import Job, fill_adapter
from fedlora.commands.export.origin import Origin
from fedlora.commands.export.request import read_request
from support.merging import made

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
ADAPTER = made({NAMES[0]: ((12, 10), 6), NAMES[1]: ((12, 10), 2)})


def job(reader: str, cut: int, rank: int) -> Job:
    request = read_request(["x", "--for", reader])
    return Job(
        Origin("x", Path("x"), ADAPTER, "adapter"), request, spectrum(ADAPTER.deltas), cut, rank
    )


@pytest.mark.parametrize("reader", ["vllm", "llama.cpp", "ollama"])
def test_one_rank_for_all_modules_and_no_patterns(reader: str, tmp_path: Path) -> None:
    checks = fill_adapter(job(reader, 6, 8), tmp_path)
    assert all(check.passed for check in checks)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert {x.rank for x in load_adapter(tmp_path).deltas.values()} == {8}
    assert (tmp_path / "Modelfile").exists() == (reader == "ollama")


def test_peft_gets_every_modules_own_rank(tmp_path: Path) -> None:
    checks = fill_adapter(job("peft", 4, 4), tmp_path)
    assert all(check.passed for check in checks)
    assert "stated" in checks[1].what
    assert {n: x.rank for n, x in load_adapter(tmp_path).deltas.items()} == {
        NAMES[0]: 4,
        NAMES[1]: 2,
    }


def test_mlx_gets_its_own_files(tmp_path: Path) -> None:
    checks = fill_adapter(job("mlx", 6, 6), tmp_path)
    assert all(check.passed for check in checks)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_layers"] == 2


def test_an_export_that_is_another_model_does_not_pass(tmp_path: Path) -> None:
    wrong = job("peft", 6, 6)
    x = ADAPTER.deltas[NAMES[0]]
    moved = {**ADAPTER.deltas, NAMES[0]: replace(x, B=x.B * 1.01)}
    other = replace(wrong.origin, adapter=replace(ADAPTER, deltas=moved))
    checks = fill_adapter(replace(wrong, origin=other), tmp_path)
    assert [check.passed for check in checks] == [True, False]
    assert 0.005 < checks[1].reached < 0.01
