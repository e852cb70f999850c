"""Keeps tokens in the user's cache directory, so that no later run has to make them again.

A file is found by what the template made of the rows, whatever their order: runs that divide the
same rows in other ways share it. The files lie beside those of `datasets` (`HF_DATASETS_CACHE`,
`HF_HOME`) under `fedlora`. Only their owner can read them, since they hold what private data says.
`datasets.disable_caching()` turns this off.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
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

from fedlora.data.cache_directory import cache_directory
from fedlora.data.rendered import Chat, Rendered
from fedlora.data.tokenize import IGNORE, Outcome, Tokens, labels_of, tokenize_all

VERSION = 2
"""Raised when `tokenize` or `conversations` make other tokens of a rendered row, or when the files
are laid out differently: files of another version are not found."""
SMALLEST = 2**20
"""Bytes of all rows below which nothing is kept: they are tokenised in less than about a second."""
LARGEST = 2 * 2**30
"""Bytes of all files together. Beyond, the files that were not used for longest are removed."""

_CHANGES_BY_CALL = re.compile(r"strftime_now|\|\s*random\b|\blipsum\b")
"""Parts of a chat template that render the same conversation differently in another call."""


def tokens_of(
    rendered: Sequence[Rendered | str],
    tokenizer: Any,
    max_length: int,
    completion_only: bool,
    label_names: Sequence[str] = (),
    threads: int | None = None,
) -> list[Outcome]:
    """The tokens of rows: those that an earlier run kept, or made now and kept for the next run.

    Args:
        rendered: rows as `tokenize.render` gives them.
        tokenizer: of transformers.
        max_length: tokens kept, from the first.
        completion_only: take the loss on the completion, or on all assistant turns, alone.
        label_names: a classifier's labels in the order of their ids.
        threads: to tokenise with; None: torch's number.

    Returns:
        For each row its tokens, or why it is dropped.

    Raises:
        InputError: as `tokenize.tokenize`.
    """

    def make(rows: Sequence[Rendered | str]) -> list[Outcome]:
        number = threads or _torch_threads()
        return tokenize_all(rows, tokenizer, max_length, completion_only, label_names, number)

    digests = _digests(rendered)
    directory = digests and cache_directory()
    key = directory and _key(
        set(digests), tokenizer, rendered, [max_length, completion_only, list(label_names)]
    )
    if not digests or not directory or not key:
        return make(rendered)
    path = directory / f"{key}.safetensors"
    different = dict(zip(digests, rendered, strict=True))  # equal rows are tokenised once
    in_file = sorted(different)  # the file's order does not depend on that of the rows
    outcomes = _read(path, len(in_file))
    if outcomes is None:
        made = dict(zip(different, make(list(different.values())), strict=True))
        outcomes = [made[digest] for digest in in_file]
        _write(path, outcomes)
    by_digest = dict(zip(in_file, outcomes, strict=True))
    return [by_digest[digest] for digest in digests]


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


# --- what decides the tokens ---


def _digests(rendered: Sequence[Rendered | str]) -> list[bytes]:
    """Every row's SHA-256; empty: the rows are not worth keeping, or cannot be told apart."""
    size, digests = 0, []
    for row in rendered:
        if isinstance(row, Chat):
            try:
                # What JSON cannot hold may look alike (`repr`) and be different.
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
    """The name of the file for these rows' tokens; None: they may differ from call to call.

    Args:
        digests: of the rows.
        tokenizer: of transformers.
        rendered: the rows.
        settings: what else decides their tokens.
    """
    definition = _definition(tokenizer)
    if definition is None:
        return None
    if any(isinstance(row, Chat) for row in rendered) and _CHANGES_BY_CALL.search(
        json.dumps(definition["chat_template"])
    ):
        return None
    digest = hashlib.sha256(json.dumps([VERSION, definition, settings]).encode())
    for row in sorted(digests):
        digest.update(row)
    return digest.hexdigest()


def _definition(tokenizer: Any) -> dict[str, Any] | None:
    """All that a tokenizer's tokens depend on; None: it is not known."""
    kind = type(tokenizer)
    # Classes from elsewhere (trust_remote_code) may compute anything in Python.
    if not getattr(tokenizer, "is_fast", False) or not kind.__module__.startswith("transformers."):
        return None
    try:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception:  # a part of the tokenizer is written in Python, and cannot be serialised
        return None
    if core["model"].get("dropout"):
        return None
    return {
        # Truncation and padding are what the last call asked for; the next call changes them.
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


def _read(path: Path, number: int) -> list[Outcome] | None:
    """The outcomes of so many rows from a file; None: there is none, or it is damaged."""
    try:
        arrays = load(path.read_bytes())
        if arrays.pop("sha256").tobytes() != _checksum(arrays):
            return None
        with suppress(OSError):
            os.utime(path)  # files used lately are kept longest
        outcomes = _outcomes(arrays)
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    return outcomes if len(outcomes) == number else None


def _write(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Keep outcomes in a file, if it can be written and is not too large."""
    kept = [row for row in outcomes if not isinstance(row, str)]
    if not kept:
        return
    arrays = _arrays(outcomes)
    content = save({**arrays, "sha256": np.frombuffer(_checksum(arrays), np.uint8)})
    if len(content) > LARGEST:
        return
    temporary = None
    try:
        # The temporary file has mode 0600, and every process that writes the same one its own.
        handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
        _make_room(path.parent)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _make_room(directory: Path) -> None:
    """Remove the files that were not used for longest until the others are small enough."""
    files = []
    for path in directory.iterdir():
        with suppress(FileNotFoundError):  # another process may make room at the same time
            if path.suffix in (".safetensors", ".tmp"):
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    size = sum(entry[1] for entry in files)
    for _, freed, path in sorted(files):
        if size <= LARGEST:
            return
        path.unlink(missing_ok=True)
        size -= freed


def _checksum(arrays: dict[str, np.ndarray[Any, Any]]) -> bytes:
    """SHA-256 over the arrays with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _arrays(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray[Any, Any]]:
    """Outcomes as arrays: the tokens of all rows in one, their lengths, why others are dropped."""
    kept = [row for row in outcomes if not isinstance(row, str)]
    reasons = sorted({row for row in outcomes if isinstance(row, str)})
    number = {reason: i for i, reason in enumerate(reasons)}
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "reasons": np.frombuffer(json.dumps(reasons).encode(), np.uint8),
        "dropped": np.array(
            [number[row] if isinstance(row, str) else -1 for row in outcomes], np.int32
        ),
        "lengths": np.array([len(row["input_ids"]) for row in kept], np.int64),
    }
    for name in ("input_ids", "token_type_ids"):
        if name in kept[0]:
            arrays[name] = _flat(kept, name)
    if "label" in kept[0]:
        arrays["label"] = np.array([row["label"] for row in kept], np.int32)
    else:
        arrays["learnt"] = _flat(kept, "labels") != IGNORE
    return arrays


def _flat(rows: Sequence[Tokens], name: str) -> np.ndarray[Any, Any]:
    """The numbers of all rows one behind the other."""
    return np.fromiter(chain.from_iterable(row[name] for row in rows), np.int32)


def _outcomes(arrays: dict[str, np.ndarray[Any, Any]]) -> list[Outcome]:
    """Outcomes from the arrays of `_arrays`, in the same order."""
    reasons = json.loads(arrays["reasons"].tobytes())
    ends = np.cumsum(arrays["lengths"])
    bounds = iter(zip((ends - arrays["lengths"]).tolist(), ends.tolist(), strict=True))
    labels = iter(arrays["label"].tolist() if "label" in arrays else ())
    flat = [name for name in ("input_ids", "token_type_ids") if name in arrays]
    outcomes: list[Outcome] = []
    for reason in arrays["dropped"].tolist():
        if reason >= 0:
            outcomes.append(reasons[reason])
            continue
        begin, end = next(bounds)
        row: dict[str, Any] = {name: arrays[name][begin:end].tolist() for name in flat}
        if "label" in arrays:
            row["label"] = next(labels)
        else:
            row["labels"] = labels_of(row["input_ids"], arrays["learnt"][begin:end].tolist())
        outcomes.append(row)
    return outcomes
