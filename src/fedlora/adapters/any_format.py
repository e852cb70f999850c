"""Reads an adapter of any format that LoRA adapters of language models come in.

- PEFT's directories, by `saved_adapter`.
- loralib's files: names without a prefix, and no configuration; `r` and `lora_alpha` have to stand
  in an `adapter_config.json` beside them.
- MLX's directories: `adapters.safetensors`, and its own `adapter_config.json`.
- GGUF files, as llama.cpp loads them.

Adapters of image models (kohya's, diffusers') are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fedlora.adapters import saved_adapter
from fedlora.adapters.export.gguf_adapter import read_gguf_adapter
from fedlora.adapters.export.mlx import CONFIG, WEIGHTS, read_mlx
from fedlora.adapters.peft_files import (
    CONFIG_NAME,
    MODEL_CONFIG_NAME,
    read_json,
    read_weights,
    weights_file,
)
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError
from fedlora.lowrank import LowRank

_IMAGE_PARTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.")
"""How diffusers' names begin."""


def load_adapter(path: str | Path) -> SavedAdapter:
    """Read an adapter: a directory of PEFT, MLX or loralib, or a GGUF file.

    Args:
        path: a directory, or the file itself.

    Raises:
        InputError: it is of another format or cannot be read, and what to do.
    """
    path = Path(path)
    try:
        is_file, is_directory = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # no file can have this name; the reader of PEFT's says so
        is_file = is_directory = False
    if not (is_file or is_directory):
        return saved_adapter.load_adapter(path)
    if (file := _gguf_file(path)) is not None:
        return _from_gguf(path, file)
    if (path / WEIGHTS).is_file() and "lora_parameters" in _config(path / CONFIG):
        return _from_mlx(path)
    if is_file:
        if (path.parent / CONFIG_NAME).is_file() and weights_file(path.parent) == path:
            return saved_adapter.load_adapter(path.parent)
        _refuse_by_name(path, _keys(path))
        raise InputError(f"{path}: is one file; name the directory that it lies in")
    if not (path / CONFIG_NAME).is_file() and (file := weights_file(path)) is not None:
        _refuse_by_name(path, _keys(file))
    return saved_adapter.load_adapter(path)


def _config(path: Path) -> Mapping[str, Any]:
    """A configuration; empty where there is none that can be read."""
    try:
        return read_json(path)
    except (OSError, InputError):
        return {}


# --- GGUF ---


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that is meant: the path itself, or the only one of a directory without PEFT."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / CONFIG_NAME).is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    named = [file for file in files if file.name == "adapter.gguf"]
    return next(iter(named or files), None) if len(named or files) == 1 else None


def _from_gguf(path: Path, file: Path) -> SavedAdapter:
    """An adapter of llama.cpp; heads are counted by the base's `config.json`, if it lies there."""
    config = _config(file.parent / MODEL_CONFIG_NAME)
    counts = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    facts = {name: int(config[key]) for name, key in counts.items() if config.get(key)}
    found = read_gguf_adapter(file, facts)
    return _plain(path, found.deltas, found.embeddings, None)


# --- MLX ---


def _from_mlx(path: Path) -> SavedAdapter:
    config = read_json(path / CONFIG)
    deltas = read_mlx(path, None)
    embeddings = frozenset(name for name in deltas if name.endswith("embed_tokens"))
    return _plain(path, deltas, embeddings, config.get("model"))


def _plain(
    path: Path, deltas: Mapping[str, LowRank], embeddings: frozenset[str], base: Any
) -> SavedAdapter:
    """What PEFT's configuration would say of an adapter of a language model."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base if isinstance(base, str) else None,
    }
    return SavedAdapter(dict(deltas), {}, config, embeddings=embeddings, source=str(path))


# --- files without a configuration ---


def _keys(file: Path) -> list[str]:
    """The names of a file's tensors."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys())
        except Exception as error:
            raise InputError(f"{file}: cannot be read: {error}") from None
    return list(read_weights(file.parent, file))


def _refuse_by_name(path: Path, keys: Iterable[str]) -> None:
    """Refuse weights whose names tell what they are, and say what to do.

    Raises:
        InputError: they are kohya's, diffusers' or, without a configuration, loralib's.
    """
    keys = list(keys)
    if any(key.startswith(("lora_unet_", "lora_te")) for key in keys):
        raise InputError(
            f"{path}: is an adapter of an image model in kohya's format (sd-scripts), and fedlora "
            "combines those of language models and classifiers; sd-scripts merges its own by "
            "networks/svd_merge_lora.py"
        )
    if any(key.startswith(_IMAGE_PARTS) and "lora" in key for key in keys):
        raise InputError(
            f"{path}: is an adapter of an image model in diffusers' format, and fedlora combines "
            "those of language models and classifiers; diffusers combines its own by "
            "pipe.load_lora_weights of each and pipe.set_adapters with their weights"
        )
    if any(key.endswith(".lora_A") and not key.startswith("base_model.") for key in keys):
        raise InputError(
            f"{path}: is in loralib's format, which does not say alpha; put an {CONFIG_NAME} "
            'beside it with what it was trained with, as {"r": 8, "lora_alpha": 16, "task_type": '
            '"SEQ_CLS", "base_model_name_or_path": "roberta-base"}'
        )
