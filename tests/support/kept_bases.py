"""Loads a base model once for many runs: loading and examining it takes longer than a short run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.model.base import BaseModel
from fedlora.model.sources import Source
from fedlora.runs import session, site_session

MOST = 6
"""Models that are kept at a time."""

_OWN_LOADING = ("torch_compile", "gradient_checkpointing", "use_liger_kernel")
"""Keys that change the model's own code, so that nobody else may use it."""

_READ = (
    "dtype",
    "load_in_8bit",
    "load_in_4bit",
    "use_cpu",
    "lora_target_modules",
    "tokenizer_name",
    "chat_template_path",
)
"""Keys that loading a causal model reads."""

original_load_base: Callable[..., tuple[BaseModel, list[str]]] = session.load_base
"""What loads a base of its own for every run."""

_kept: dict[str, tuple[BaseModel, list[str]]] = {}


def _name_of(source: Source, config: Config) -> str:
    """Names a model: its files as they lie on the disk, and the keys that loading it reads."""
    files = sorted(p for p in Path(source.name).glob("*") if p.is_file())
    stamps = [(p.name, (s := p.stat()).st_ino, s.st_mtime_ns, s.st_size) for p in files]
    return repr((source.name, stamps, [getattr(config, key) for key in _READ]))


def load_or_reuse(
    source: Source,
    tokenizer: Any,
    config: Config,
    label_names: Sequence[str],
    *,
    weights: bool = True,
) -> tuple[BaseModel, list[str]]:
    """`session.load_base`, or the base that it gave before, without any adapter.

    A classifier, and a model of which modules are trained whole, is loaded anew: its run changes
    parameters of the model itself.
    """
    own = (
        label_names or config.lora_modules_to_save or any(getattr(config, k) for k in _OWN_LOADING)
    )
    if own or not weights or not Path(source.name).is_dir():
        return original_load_base(source, tokenizer, config, label_names, weights=weights)
    name = _name_of(source, config)
    if name not in _kept:
        while len(_kept) >= MOST:
            del _kept[next(iter(_kept))]
        _kept[name] = original_load_base(source, tokenizer, config, label_names)
    base, notes = _kept[name]
    base.load([])
    base.model.eval()
    return replace(base, tokenizer=tokenizer), list(notes)


@pytest.fixture(scope="module")
def kept_bases() -> Iterator[None]:
    """The runs of a file's tests share the bases that they load.

    A base's weights are never written to, so that the bytes of a run are the same
    (`test_a_base_that_has_served_a_run_serves_another` in `runs/test_run.py`).
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (session, site_session):
            patch.setattr(module, "load_base", load_or_reuse)
        yield


@pytest.fixture
def fresh_bases(kept_bases: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that looks at loading, or holds two bases at a time: every run loads its own."""
    for module in (session, site_session):
        monkeypatch.setattr(module, "load_base", original_load_base)
