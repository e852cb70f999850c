"""Makes adapters to merge, and merges them in float64 by hand."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedlora.adapters.saved_adapter import CONFIG_NAME, WEIGHTS_NAME, SavedAdapter
from fedlora.commands.cli import main
from fedlora.lowrank import LowRank
from fedlora.model.layers import is_conv1d

Dense64 = dict[str, Tensor]
"""Target module -> its update (m, n) in float64."""


@cache
def _loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def causal(path: Path) -> Any:
    """The untouched base: a copy, as loading it for every use is slow."""
    return copy.deepcopy(_loaded(path))


def randomise(model: nn.Module, seed: int, size: float = 0.2) -> None:
    """Both factors, and what is trained beside them, as if training had moved all of them."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(size * torch.randn(p.shape, generator=rng))


_saved: dict[tuple[Path, int, str], dict[str, bytes]] = {}
"""Base, seed and options -> the files that PEFT wrote."""


def peft_saves(path: Path, base: Any, seed: int = 0, **options: Any) -> Path:
    """A LoRA directory written by PEFT, for a base path or a model.

    For a base path the same options give the same files, which PEFT writes once.
    """
    if not isinstance(base, Path):
        return _peft_writes(path, base, seed, **options)
    key = (base, seed, repr(sorted(options.items())))
    if key in _saved:
        path.mkdir(parents=True)
        for name, content in _saved[key].items():
            (path / name).write_bytes(content)
    else:
        _peft_writes(path, base, seed, **options)
        _saved[key] = {file.name: file.read_bytes() for file in path.iterdir()}
    return path


def _peft_writes(path: Path, base: Any, seed: int, **options: Any) -> Path:
    model = causal(base) if isinstance(base, Path) else base
    options = {"task_type": "CAUSAL_LM", **options}
    # Else PEFT copies the base weights of an embedding or output layer into the directory.
    copies: Any = options.pop("save_embedding_layers", False)
    model = get_peft_model(model, LoraConfig(**options))
    randomise(model, seed)
    model.save_pretrained(path, save_embedding_layers=copies)
    return path


def older_format(path: Path) -> None:
    """The same directory with `adapter_model.bin`."""
    torch.save(load_file(path / WEIGHTS_NAME), path / "adapter_model.bin")
    (path / WEIGHTS_NAME).unlink()


def change_config(path: Path, **values: Any) -> None:
    """Overwrite keys of `adapter_config.json`."""
    config = {**json.loads((path / CONFIG_NAME).read_text()), **values}
    (path / CONFIG_NAME).write_text(json.dumps(config))


def peft_effect(base: Any, path: Path) -> Dense64:
    """What PEFT adds to each weight: its modules, its factors and its scale, in float64."""
    model = PeftModel.from_pretrained(causal(base) if isinstance(base, Path) else base, path)
    out = {}
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or not hasattr(module, "scaling"):
            continue
        a, b = module.lora_A["default"], module.lora_B["default"]
        if hasattr(module, "ranknum"):  # AdaLoRA
            a = a.detach().double() * module.lora_E["default"].detach().double()
            factor = module.scaling["default"] / (float(module.ranknum["default"]) + 1e-5)
            product = factor * (b.detach().double() @ a)
        else:
            product = module.scaling["default"] * (
                b.weight.detach().double() @ a.weight.detach().double()
            )
        out[name.removeprefix("base_model.model.")] = product
    return out


def weighted(effects: Sequence[Dense64], weights: Sequence[float] | None = None) -> Dense64:
    """The weighted sum; a module that is missing counts as zero, with the full weight."""
    given = list(weights or [1.0] * len(effects))
    out: Dense64 = {}
    for one, w in zip(effects, given, strict=True):
        for name, x in one.items():
            out[name] = out.get(name, torch.zeros_like(x)) + w / sum(given) * x
    return out


def same_effect(found: Dense64, wanted: Dense64, tolerance: float = 1e-5) -> None:
    """Module by module, relative to the largest entry."""
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        scale = max(float(x.abs().max()), 1e-3)
        torch.testing.assert_close(found[name], x, rtol=0, atol=tolerance * scale, msg=name)


def token_ids(size: int = 100) -> Tensor:
    """Two sequences of 12 tokens."""
    return torch.randint(4, size - 1, (2, 12), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> Tensor:
    """Of `token_ids`, dropout off."""
    model.eval()
    with torch.no_grad():
        out: Tensor = model(input_ids=token_ids(min(100, model.config.vocab_size))).logits
    return out


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    """`fedlora aggregate ...` in this process: exit code, standard output and error."""

    def call(*arguments: Any) -> SimpleNamespace:
        capsys.readouterr()
        code = main(["aggregate", *map(str, arguments)])
        found = capsys.readouterr()
        return SimpleNamespace(code=code, out=found.out, err=found.err)

    return call


def refused(done: SimpleNamespace, says: str, output: Path | None = None) -> None:
    """Exit code 2, one line that says why, nothing on standard output, nothing left behind."""
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("fedlora: ")
    assert done.err.count("\n") == 1
    assert re.search(says, done.err), done.err
    assert "__init__" not in done.err  # names of our own code explain nothing
    if output is not None:
        assert not output.exists()


def made(
    parts: Mapping[str, tuple[tuple[int, int], int]], seed: int = 0, **config: Any
) -> SavedAdapter:
    """Normal factors: module -> ((m, n), rank)."""
    rng = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, ((m, n), rank) in parts.items():
        a = torch.randn(rank, n, generator=rng)
        deltas[name] = LowRank(a, torch.randn(m, rank, generator=rng))
    plain = {"base_model_name_or_path": "base", "task_type": "CAUSAL_LM"}
    return SavedAdapter(deltas, {}, {**plain, "target_modules": sorted(parts), **config})


@pytest.fixture
def pair(tiny_llama: Path, tmp_path: Path) -> list[Path]:
    """Two directories PEFT wrote, of ranks 4 and 2, for a test to spoil."""
    return [
        peft_saves(tmp_path / "in" / f"{i}", tiny_llama, i, r=r, target_modules=["q_proj"])
        for i, r in enumerate((4, 2))
    ]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of a model of 12 layers, of different ranks and targets."""
    path = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    out = []
    for i, options in enumerate(
        ({"r": 4, "target_modules": ["q_proj"]}, {"r": 2, "target_modules": ["q_proj", "up_proj"]})
    ):
        out.append(peft_saves(path / f"site-{i}", LlamaForCausalLM(config), i, **options))
    return out


def effect(adapter: SavedAdapter) -> Dense64:
    """What we hold, multiplied out."""
    return {n: x.B.double() @ x.A.double() for n, x in adapter.deltas.items()}


def add_to(model: Any, deltas: Dense64) -> Any:
    """The model with dense updates added to its weights."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, x in deltas.items():
            layer = modules[name]
            moved = layer.weight + (x.T if is_conv1d(layer) else x).float()
            layer.weight = nn.Parameter(moved)  # a new one: the old may be another layer's too
    return model


def true_error(kept: Dense64, wanted: Dense64) -> dict[str, float]:
    """Layer by layer, dense in float64."""
    return {n: float((kept[n] - x).norm() / x.norm()) for n, x in wanted.items()}
