"""Tells which base models that adapters name are one, and what is known of them from disk."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from fedlora.adapters.peft_files import MODEL_CONFIG_NAME, read_json
from fedlora.errors import InputError

_SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/([^/]+)$")
_QUANTISED = re.compile(r"(4|8)-?bit|gptq|awq|gguf|fp8|int(4|8)", re.IGNORECASE)
_SAMPLE = 4096
"""Bytes read of each of the base's tensors to tell bases apart."""


def base_name(config: Mapping[str, Any]) -> str:
    """The base that an adapter names, in the shortest form that means the same; "": it names none.

    There is no slash at the end, and a directory of the hub's cache becomes the hub's name.
    """
    name = str(config.get("base_model_name_or_path") or "").strip()
    plain = name.replace("\\", "/") if re.match(r"^[A-Za-z]:\\", name) else name
    plain = plain.rstrip("/") or plain
    if snapshot := _SNAPSHOT.search(plain):
        return f"{snapshot[1]}/{snapshot[2]}"
    return plain


def same_name(one: str, other: str) -> bool:
    """Whether two names mean the same base beyond doubt.

    They do if they are equal, if they lead to one directory, or if one of them is the other without
    its organisation, as the hub used to name models. An empty name fits every other.
    """
    if one == other or not one or not other:
        return True
    ends = one.rpartition("/")[2] == other.rpartition("/")[2]
    return (ends and (("/" in one) != ("/" in other))) or _same_directory(one, other)


def _same_directory(one: str, other: str) -> bool:
    """Whether both are paths of one directory on this machine."""
    try:
        return Path(one).is_dir() and Path(one).resolve() == Path(other).resolve()
    except (OSError, ValueError):
        return False


def common_base(names: Sequence[str]) -> str | None:
    """The name to write for a base that adapters name differently; None where none has a name.

    A name of the hub goes before a path, the unquantised model before a quantised one, a name with
    its organisation before one without, and then the first.
    """

    def rank(name: str) -> tuple[bool, bool, bool, int]:
        hub = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and "\\" not in name
        hub = hub and not _is_here(name)
        return (not hub, bool(_QUANTISED.search(name)), "/" not in name, names.index(name))

    return min((name for name in names if name), key=rank, default=None)


def _is_here(name: str) -> bool:
    """Whether there is a directory of this name on this machine."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def check_bases(configs: Sequence[Mapping[str, Any]], same_base: bool) -> list[str]:
    """Notes on bases that are named differently; none where they are one or the user says so.

    Args:
        configs: contents of each `adapter_config.json`.
        same_base: the user says that they are one.

    Raises:
        InputError: both are on this machine and are not the same.
    """
    if same_base:
        return []
    notes = []
    names = list(dict.fromkeys(name for c in configs if (name := base_name(c))))
    different: list[str] = []
    for one, other in combinations(names, 2):
        if same_name(one, other):
            continue
        equal = _equal_weights(one, other)
        if equal is False:
            raise InputError(
                f"base_model_name_or_path: {one} and {other}: both are here, and they are "
                "different models; adapters of different bases cannot be combined. Give "
                "--same_base (same_base=True) if you know better"
            )
        if equal is None:
            different = different or [one, other]
            different += [name for name in (one, other) if name not in different]
    if different:
        notes.append(
            f"base_model_name_or_path: {', '.join(different)}: the adapters name their base "
            "differently; their shapes agree, and whether it is one model is not written in them. "
            "--same_base (same_base=True) says that it is"
        )
    revisions = list(dict.fromkeys(str(c["revision"]) for c in configs if c.get("revision")))
    if len(revisions) > 1:
        notes.append(
            f"revision: {', '.join(revisions)}: the adapters were trained on different revisions "
            "of their base; --same_base (same_base=True) says that its weights are the same"
        )
    return notes


# --- what is on this machine ---


def base_directory(name: str, revision: str | None = None) -> Path | None:
    """Where a base's files lie on this machine: its directory, or the hub's cache."""
    try:
        if name and Path(name).is_dir():
            return Path(name)
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, MODEL_CONFIG_NAME, revision=revision)
        return Path(cached).parent if isinstance(cached, str) else None
    except Exception:  # it is not a name that the hub could have
        return None


def base_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The base's own `config.json`, where it is on this machine."""
    for name in (str(config.get("base_model_name_or_path") or ""), base_name(config)):
        revision = config.get("revision")
        where = base_directory(name, revision if isinstance(revision, str) else None)
        if where is not None:
            try:
                return read_json(where / MODEL_CONFIG_NAME)
            except (InputError, FileNotFoundError):
                continue
    return None


def _equal_weights(one: str, other: str) -> bool | None:
    """Whether two bases have the same weights, by the first bytes of each tensor; None: unknown."""
    first, second = (base_directory(name) for name in (one, other))
    if first is None or second is None:
        return None
    a, b = _samples(first), _samples(second)
    common = [name for name in a if name in b and a[name][0] == b[name][0]]
    if not common:
        return None
    return all(a[name] == b[name] for name in common)


def _samples(path: Path) -> dict[str, tuple[str, str]]:
    """Tensor -> its dtype and shape, and a digest of its first bytes.

    The tensors are those of the directory's safetensors files that can be read.
    """
    samples = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            for name, kind, raw in _tensors_of(file):
                samples[name] = kind, hashlib.sha256(raw).hexdigest()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return samples


def _tensors_of(file: Path) -> Iterator[tuple[str, str, bytes]]:
    """Name, dtype with shape, and first bytes of each tensor of a safetensors file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(min(size, 100_000_000)))
        for name, about in header.items():
            if name != "__metadata__":
                start, end = about["data_offsets"]
                opened.seek(8 + size + start)
                kind = f"{about['dtype']} {about['shape']}"
                yield name, kind, opened.read(min(_SAMPLE, end - start))


# --- its architecture ---


def architectures(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> list[str]:
    """Names of the classes an adapter may have been trained with, the likeliest first."""
    mapping = config.get("auto_mapping")
    of_adapter = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    of_model = model_config.get("architectures")
    named = [of_adapter, *(of_model if isinstance(of_model, list) else [])]
    known = [name for name in named if isinstance(name, str)]
    return [*known, *_AUTO.get(str(config.get("task_type")), _AUTO_WITHOUT_TASK)]


_AUTO_WITHOUT_TASK = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")
_AUTO: dict[str, tuple[str, ...]] = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "SEQ_CLS": ("AutoModelForSequenceClassification",),
    "TOKEN_CLS": ("AutoModelForTokenClassification",),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM",),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering",),
    "FEATURE_EXTRACTION": ("AutoModel",),
}


def skeletons(
    config: Mapping[str, Any], model_config: Mapping[str, Any] | None, only_renamed: bool = False
) -> Iterator[Any]:
    """Models without weights that an adapter may have been trained on, the likeliest first.

    Args:
        config: of the adapter.
        model_config: of the model; None: from `auto_mapping` alone, with the library's defaults.
        only_renamed: none where transformers has not renamed modules of this architecture.
    """
    import torch
    import transformers
    from transformers import AutoConfig

    model_keys = dict(model_config or {})
    kind = model_keys.get("model_type")
    mapping = config.get("auto_mapping")
    if not kind and isinstance(mapping, Mapping):
        parts = str(mapping.get("parent_library")).split(".")
        kind = parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else None
    for name in architectures(config, model_keys):
        if only_renamed and not _has_renamings(str(kind), name):
            continue
        try:
            library_config = AutoConfig.for_model(
                str(kind), **{k: v for k, v in model_keys.items() if k != "model_type"}
            )
            with torch.device("meta"):
                cls = getattr(transformers, name)
                make = cls.from_config if name.startswith("AutoModel") else cls
                yield make(library_config)
        except Exception:  # the library has no such class, or it takes more than a configuration
            continue


def _has_renamings(kind: str, name: str) -> bool:
    """Whether transformers has renamed modules of this model type or class."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        return any(get_checkpoint_conversion_mapping(key) is not None for key in (kind, name))
    except Exception:
        return False
