"""Writes and reads LoRA adapters as MLX's language models (mlx-lm) hold them.

    adapters.safetensors   NAME.lora_a (n, r) and NAME.lora_b (r, m) of every module
    adapter_config.json    num_layers, and lora_parameters: rank, scale, dropout, keys

MLX computes `y = W x + scale * (x lora_a) lora_b`: the factors are PEFT's transposed, and `scale`
is a factor where PEFT has `alpha / r`. One rank and one scale hold for all layers; `keys` names the
modules within a layer, and modules outside of the layers by their full names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fedlora.adapters.peft_files import read_json, save_tensors
from fedlora.errors import InputError
from fedlora.lowrank import LowRank

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


def write_mlx(path: Path, factors: Mapping[str, LowRank], num_layers: int, model: str) -> None:
    """Write an MLX adapter of scale 1.

    Args:
        path: a directory, which is made.
        factors: module -> `A (r, n)`, `B (m, r)` of one rank; of an embedding the transpose of what
            its table `(tokens, width)` changes by, so that the same files come out.
        num_layers: of the whole model.
        model: the base's name, which MLX keeps there too.

    Raises:
        CheckpointError: what was read back is not what was written.
        OSError: a file cannot be written.
        ValueError: factors of several ranks.
    """
    ranks = {x.rank for x in factors.values()}
    if len(ranks) != 1:
        raise ValueError(f"MLX adapters have one rank, got {sorted(ranks)}")
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "dropout": 0.0,
            "keys": sorted({_key(name) for name in factors}),
            "rank": ranks.pop(),
            "scale": 1.0,
        },
        "model": model,
        "num_layers": num_layers,
    }
    tensors: dict[str, Tensor] = {}
    for name, x in factors.items():
        tensors[f"{name}.lora_a"] = x.A.T.contiguous()
        tensors[f"{name}.lora_b"] = x.B.T.contiguous()
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(config, indent=4) + "\n")
    save_tensors(path / WEIGHTS, tensors)


def _key(name: str) -> str:
    """What `keys` calls a module."""
    match = _LAYER.match(name)
    return match[2] if match else name


def read_mlx(path: Path, num_layers: int | None) -> dict[str, LowRank]:
    """The updates that MLX would compute with, `scale * (lora_a lora_b)^T`, by module.

    Modules that MLX would pass over are left out: those that `keys` does not name, and those before
    the model's last `num_layers` layers, as the configuration counts them.

    Args:
        path: the directory.
        num_layers: of the whole model; None: it is not known, and no layer is left out.

    Raises:
        InputError: no MLX adapter, or one whose tensors do not fit its configuration.
    """
    try:
        config: Mapping[str, Any] = read_json(path / CONFIG)
        tensors = load_file(path / WEIGHTS)
        parameters = config["lora_parameters"]
        keys, scale, rank = parameters.get("keys"), float(parameters["scale"]), parameters["rank"]
        adapted = int(config["num_layers"])  # the last so many; -1: all
        first = 0 if num_layers is None or adapted < 0 else num_layers - adapted
    except (OSError, KeyError, TypeError) as error:
        raise InputError(f"{path}: holds no MLX adapter ({error})") from None
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise InputError(
            f"{path}: fine_tune_type is {kind!r}; only lora is a sum of products: fuse it into its "
            "base by mlx_lm.fuse, or train it again with --fine-tune-type lora"
        )
    out = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        if a is None or b is None or a.shape[1] != rank or b.shape[0] != rank:
            raise InputError(f"{path}: the factors of {name} are incomplete or not of rank {rank}")
        match = _LAYER.match(name)
        if (keys is None or _key(name) in keys) and (match is None or int(match[1]) >= first):
            out[name] = LowRank(a.T, scale * b.T)
    return out
