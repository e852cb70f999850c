"""Keeps tokens in the user's cache directory, so that no later run has to make them again.

Rows are known by what their template made of them, not by where they stand: runs that divide the
same rows in other ways find the same file. The files lie beside those of `datasets`
(`HF_DATASETS_CACHE`, `HF_HOME`) under `fedlora`, readable by their owner alone, since they hold
what private data says. `datasets.disable_caching()` turns this off.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedlora.data.rendered import Chat, Rendered
from fedlora.data.tokenize import IGNORE, Outcome, Tokens, labels_of, tokenize_all

VERSION = 2
"""Of what `tokenize` and `conversations` make of a rendered row, and of the files; another
finds none of the old."""
SMALLEST = 2**20
"""Rows of fewer bytes altogether are tokenised in less than about a second, and not kept."""
LARGEST = 2 * 2**30
"""Bytes of all files together; beyond, those go that were not used for longest."""

_BY_THE_CALL = re.compile(r"strftime_now|\|\s*random\b|\blipsum\b")
"""What makes something else of the same conversation tomorrow."""


def tokens_of(
    rendered: Sequence[Rendered | str],
    tokenizer: Any,
    max_length: int,
    completion_only: bool,
    label_names: Sequence[str] = (),
    threads: int | None = None,
) -> list[Outcome]:
    """Rows as tokens: those of an earlier run, or made now and kept for the next.

    Args:
        rendered: of `tokenize.render`.
        tokenizer: of transformers.
        max_length: tokens kept, from the first.
        completion_only: take the loss on the completion, or on all assistant turns, alone.
        label_names: a classifier's labels in the order of their ids.
        threads: to make them with; none: torch's number.

    Raises:
        InputError: as `tokenize.tokenize`.
    """

    def made(rows: Sequence[Rendered | str]) -> list[Outcome]:
        number = threads or _torch_threads()
        return tokenize_all(rows, tokenizer, max_length, completion_only, label_names, number)

    digests = _digests(rendered)
    directory = digests and _directory()
    key = directory and _key(
        set(digests), tokenizer, rendered, [max_length, completion_only, list(label_names)]
    )
    if not digests or not directory or not key:
        return made(rendered)
    path = directory / f"{key}.safetensors"
    first = dict(zip(reversed(digests), reversed(rendered), strict=True))
    order = sorted(first)
    outcomes = _read(path, len(order))
    if outcomes is None:
        unique = list(dict.fromkeys(digests))
        fresh = dict(zip(unique, made([first[digest] for digest in unique]), strict=True))
        outcomes = [fresh[digest] for digest in order]
        _write(path, outcomes)
    table = dict(zip(order, outcomes, strict=True))
    return [table[digest] for digest in digests]


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


# --- what decides the tokens ---


def _digests(rendered: Sequence[Rendered | str]) -> list[bytes]:
    """Every row's SHA-256; none: they are not worth keeping, or cannot be told apart."""
    size, digests = 0, []
    for row in rendered:
        if isinstance(row, Chat):
            try:  # a chat template is shown anything that stands there, also what has no name
                json.dumps([row.messages, row.extra])
            except (TypeError, ValueError):
                return []
        content = repr(row).encode()
        size += len(content)
        digests.append(hashlib.sha256(content).digest())
    return digests if size >= SMALLEST else []


def _key(
    digests: set[bytes], tokenizer: Any, rendered: Sequence[Rendered | str], settings: list[Any]
) -> str | None:
    """The name of what these rows become; None: it may be something else each time."""
    definition = _definition(tokenizer)
    if definition is None:
        return None
    if any(isinstance(row, Chat) for row in rendered) and _BY_THE_CALL.search(
        json.dumps(definition["chat_template"])
    ):
        return None
    digest = hashlib.sha256(json.dumps([VERSION, definition, settings]).encode())
    for row in sorted(digests):
        digest.update(row)
    return digest.hexdigest()


def _definition(tokenizer: Any) -> dict[str, Any] | None:
    """All that a tokenizer's tokens follow from; None: it is not known."""
    kind = type(tokenizer)
    # Other classes may do anything in Python (trust_remote_code).
    if not getattr(tokenizer, "is_fast", False) or not kind.__module__.startswith("transformers."):
        return None
    try:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception:  # tokenizers' own: a part of it is written in Python
        return None
    if core["model"].get("dropout"):
        return None
    return {
        # What the last call asked for stands there too, and the next call changes it.
        "core": {k: v for k, v in core.items() if k not in ("truncation", "padding")},
        "class": kind.__qualname__,
        "chat_template": tokenizer.chat_template,
        "special": [tokenizer.eos_token_id, [str(token) for token in tokenizer.all_special_tokens]],
        "named": {k: str(token) for k, token in tokenizer.special_tokens_map.items()},
        "inputs": list(tokenizer.model_input_names),
        "side": tokenizer.truncation_side,
        "split": tokenizer.split_special_tokens,
        "versions": [version(name) for name in ("transformers", "tokenizers", "jinja2")],
    }


# --- files ---


def _directory() -> Path | None:
    """Where the files lie, made where it is missing; None: nothing is kept."""
    datasets = sys.modules.get("datasets")
    if datasets is None:  # its own rules; to import it takes half a second
        from huggingface_hub.constants import HF_HOME

        beside = Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME) / "datasets"))
    elif datasets.is_caching_enabled():
        beside = Path(datasets.config.HF_DATASETS_CACHE)
    else:
        return None
    path = beside / "fedlora"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)  # refused where it is another user's, whose files are not to be read
    except OSError:
        return None
    return path


def _read(path: Path, number: int) -> list[Outcome] | None:
    """What a file holds of so many rows; None: there is none, or it is damaged."""
    try:
        arrays = load(path.read_bytes())
        if arrays.pop("sha256").tobytes() != _sum(arrays):
            return None
        with suppress(OSError):
            os.utime(path)  # what is used stays
        outcomes = _outcomes(arrays)
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    return outcomes if len(outcomes) == number else None


def _write(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Keep what rows became, if that can be."""
    kept = [row for row in outcomes if not isinstance(row, str)]
    if not kept:
        return
    arrays = _arrays(outcomes)
    content = save({**arrays, "sha256": np.frombuffer(_sum(arrays), np.uint8)})
    if len(content) > LARGEST:
        return
    temporary = None
    try:
        # Of mode 0600, and another for every process that writes the same.
        handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
        _make_room(path.parent)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _make_room(directory: Path) -> None:
    """Remove what was not used for longest until the rest is small enough."""
    files = []
    for path in directory.iterdir():
        with suppress(FileNotFoundError):  # another process makes room too
            if path.suffix in (".safetensors", ".tmp"):
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    size = sum(entry[1] for entry in files)
    for _, freed, path in sorted(files):
        if size <= LARGEST:
            return
        path.unlink(missing_ok=True)
        size -= freed


def _sum(arrays: dict[str, np.ndarray[Any, Any]]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _arrays(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray[Any, Any]]:
    """Rows one behind the other, and the reasons for those that are missing."""
    kept = [row for row in outcomes if not isinstance(row, str)]
    reasons = sorted({row for row in outcomes if isinstance(row, str)})
    number = {reason: i for i, reason in enumerate(reasons)}
    out: dict[str, np.ndarray[Any, Any]] = {
        "reasons": np.frombuffer(json.dumps(reasons).encode(), np.uint8),
        "dropped": np.array(
            [number[row] if isinstance(row, str) else -1 for row in outcomes], np.int32
        ),
        "lengths": np.array([len(row["input_ids"]) for row in kept], np.int64),
    }
    for name in ("input_ids", "token_type_ids"):
        if name in kept[0]:
            out[name] = _flat(kept, name)
    if "label" in kept[0]:
        out["label"] = np.array([row["label"] for row in kept], np.int32)
    else:
        out["learnt"] = _flat(kept, "labels") != IGNORE
    return out


def _flat(rows: Sequence[Tokens], name: str) -> np.ndarray[Any, Any]:
    return np.fromiter(chain.from_iterable(row[name] for row in rows), np.int32)


def _outcomes(arrays: dict[str, np.ndarray[Any, Any]]) -> list[Outcome]:
    """Rows as `_arrays` laid them out, in the order in which they were kept."""
    reasons = json.loads(arrays["reasons"].tobytes())
    ends = np.cumsum(arrays["lengths"])
    kept = iter(zip((ends - arrays["lengths"]).tolist(), ends.tolist(), strict=True))
    labels = iter(arrays["label"].tolist() if "label" in arrays else ())
    flat = [name for name in ("input_ids", "token_type_ids") if name in arrays]
    out: list[Outcome] = []
    for reason in arrays["dropped"].tolist():
        if reason >= 0:
            out.append(reasons[reason])
            continue
        begin, end = next(kept)
        row: dict[str, Any] = {name: arrays[name][begin:end].tolist() for name in flat}
        if "label" in arrays:
            row["label"] = next(labels)
        else:
            row["labels"] = labels_of(row["input_ids"], arrays["learnt"][begin:end].tolist())
        out.append(row)
    return out
