"""Reads and writes the files of a PEFT directory, or says why they cannot be used."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.errors import CheckpointError, InputError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OLDER_NAME = "adapter_model.bin"
_TENSOR_FILES = (".safetensors", ".bin", ".pt", ".pth")
MODEL_CONFIG_NAME = "config.json"
_POINTER = b"version https://git-lfs"
_PLAIN_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a byte-order mark of UTF-8 is skipped.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it cannot be read, and what to do.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read: {why}") from None
    _refuse_pointer(path, raw)
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: cannot be read: it is written in UTF-16; save it again in UTF-8")
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object but a {type(content).__name__}")
    return content


def read_adapter_config(path: Path) -> dict[str, Any]:
    """`adapter_config.json` of a directory.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        return read_json(path / CONFIG_NAME)
    except FileNotFoundError:
        pass
    message = f"{path}: holds no {CONFIG_NAME}; expected a PEFT directory"
    if path.is_dir() and (inside := sorted(p.parent.name for p in path.glob(f"*/{CONFIG_NAME}"))):
        message += f", as {', '.join(inside[:5])} in it {'is' if len(inside) == 1 else 'are'}"
    raise InputError(message)


def read_model_config(path: Path) -> dict[str, Any] | None:
    """The model's own `config.json` of a directory; None where there is none.

    Raises:
        InputError: there is one that cannot be read.
    """
    try:
        return read_json(path / MODEL_CONFIG_NAME)
    except FileNotFoundError:
        return None


def weights_file(path: Path) -> Path | None:
    """The file of a directory's weights: PEFT's names of it, or the only one that holds tensors."""
    named = next((path / n for n in (WEIGHTS_NAME, OLDER_NAME) if (path / n).exists()), None)
    if named is not None:
        return named
    others = [p for p in path.iterdir() if p.suffix in _TENSOR_FILES and p.is_file()]
    return others[0] if len(others) == 1 else None


def read_weights(path: Path, file: Path | None = None) -> dict[str, Tensor]:
    """Key -> tensor, of all tensors in a PEFT directory.

    Args:
        path: the directory.
        file: of its weights; None: that of `weights_file`.

    Raises:
        InputError: no weights, or a file that cannot be read, and what to do.
    """
    file = file or weights_file(path)
    if file is None:
        files = sorted(p.name for p in path.iterdir() if p.is_file())[:8]
        raise InputError(
            f"{path}: holds no {WEIGHTS_NAME} and no {OLDER_NAME}, only {', '.join(files)}"
        )
    try:
        with file.open("rb") as opened:
            _refuse_pointer(file, opened.read(64))
    except OSError as error:
        raise InputError(f"{path}: its weights cannot be read: {error.strerror}") from None
    loaded: Any
    try:
        if file.suffix == ".safetensors":
            loaded = load_file(file)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of TorchScript archives, refused below
                loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        why = _line(error)
        if "weights_only" in why or "Unsupported" in why:
            why = "it holds Python objects that are no tensors, which could run code when read"
        raise InputError(
            f"{path}: its weights cannot be read: {file.name}: {why[:300]}; copy or save it again"
        ) from None
    if not isinstance(loaded, Mapping):
        raise InputError(
            f"{file}: holds a {type(loaded).__name__} instead of tensors by name; save "
            "get_peft_model_state_dict(model)"
        )
    return _tensors(file, loaded)


def _tensors(file: Path, loaded: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict.

    Numbers and words beside them (a step, a version) are left out, since they say nothing about the
    model. Everything else may hold weights, and is refused.
    """
    tensors = {}
    for key, value in loaded.items():
        if isinstance(value, Tensor) and isinstance(key, str):
            if not key.isprintable():
                raise InputError(f"{file}: the name {key!r} of a tensor holds unprintable signs")
            tensors[key] = value
        elif value is not None and not isinstance(value, (bool, int, float, str, bytes)):
            inside = "" if not isinstance(value, Mapping) else " (a checkpoint of a trainer?)"
            raise InputError(
                f"{file}: {key!r} is a {type(value).__name__} and no tensor{inside}; save the "
                "adapter's tensors alone, by model.save_pretrained or get_peft_model_state_dict"
            )
    return tensors


def as_float(path: Path, key: str, value: Tensor) -> Tensor:
    """A tensor of weights: detached, dense, finite, of float16, bfloat16, float32 or float64.

    Args:
        path: the directory, for messages.
        key: of the tensor in the file.
        value: the tensor.

    Raises:
        InputError: it is not one of real numbers, or not finite.
    """
    if value.is_quantized or value.is_complex() or not value.is_floating_point():
        raise InputError(
            f"{path}: {key} is of {str(value.dtype).removeprefix('torch.')}; expected weights of "
            "float32, bfloat16 or float16: save the adapter without quantising it"
        )
    try:
        value = value.detach()
        if value.layout != torch.strided:
            value = value.to_dense()
        if value.dtype not in _PLAIN_FLOATS:
            value = value.float()
        finite = bool(torch.isfinite(value).all())
    except (RuntimeError, NotImplementedError, TypeError):
        raise InputError(
            f"{path}: {key} is a tensor of {str(value.dtype).removeprefix('torch.')} on "
            f"{value.device} without numbers that can be read; save the adapter again"
        ) from None
    if not finite:
        raise InputError(f"{path}: {key} holds values that are not finite")
    return value


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, read it back and compare.

    Raises:
        CheckpointError: what was read back is not what was written.
        OSError: the file cannot be written (no space, no permission).
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors reports the system's error as text; give it back its number.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number.group(1)) if number else 5, str(error), str(path)) from None
    back = load_file(path)
    same = back.keys() == tensors.keys() and all(
        torch.equal(back[k], t) for k, t in tensors.items()
    )
    if not same:
        raise CheckpointError(f"{path}: what was read back differs from what was written")


def _refuse_pointer(path: Path, head: bytes) -> None:
    """Refuse a file whose first bytes are those of a Git-LFS pointer."""
    if head.startswith(_POINTER):
        raise InputError(
            f"{path}: is a Git-LFS pointer and not the file itself; run `git lfs pull` in its "
            "repository, or download it again"
        )


def _line(error: BaseException) -> str:
    """An error's text on one line, or what it is called where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
