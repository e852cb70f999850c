"""Finds what is exported: the adapter, its run, its base, and rows to measure it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.adapters.peft_files import CONFIG_NAME
from fedlora.adapters.saved_adapter import SavedAdapter, load_adapter
from fedlora.commands.eval.options import Loading, first
from fedlora.commands.eval.subject import ADAPTER, GLOBAL, Subject, find_subject
from fedlora.data.datasets import load_data
from fedlora.data.raw_data import RawData
from fedlora.data.row_files import read_rows
from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.file_names import CONFIG
from fedlora.runs.session import tokenized


@dataclass(frozen=True)
class Origin:
    """Where an export comes from.

    Args:
        name: as the user names it.
        path: the PEFT directory.
        adapter: what it holds.
        model: `global`, `adapter` or `client-K`.
        subject: its run and its base; None: the base is not here.
        why_no_base: why not.
    """

    name: str
    path: Path
    adapter: SavedAdapter
    model: str
    subject: Subject | None = None
    why_no_base: str = ""

    @property
    def classifies(self) -> bool:
        """Whether it guesses labels instead of writing text."""
        of_adapter = self.adapter.config.get("task_type") == "SEQ_CLS"
        return of_adapter or (self.subject is not None and self.subject.classifies)

    @property
    def labels(self) -> tuple[str, ...]:
        """A classifier's labels in the order of their ids, `0`, `1` ... where nobody names them."""
        if not self.classifies:
            return ()
        named = (self.adapter.model_config or {}).get("id2label")
        if isinstance(named, dict) and named:
            return tuple(str(named[key]) for key in sorted(named, key=int))
        heads = [x.shape[0] for name, x in self.adapter.dense.items() if name.endswith(".weight")]
        return tuple(str(i) for i in range(heads[-1] if heads else 2))

    @property
    def base_name(self) -> str:
        """The base as `from_pretrained` takes it."""
        if self.subject is not None:
            return self.subject.source.name
        return str(self.adapter.config.get("base_model_name_or_path") or "")

    def needed(self) -> Subject:
        """The run and the base, where there is no going on without.

        Raises:
            InputError: the base is not here.
        """
        if self.subject is None:
            raise InputError(self.why_no_base)
        return self.subject


def find_origin(loading: Loading) -> Origin:
    """Find out what the user names, and read the adapter.

    Args:
        loading: what is named; of `models` at most one.

    Raises:
        InputError: there is no adapter, or there are several and none is chosen.
    """
    path = Path(loading.name)
    lone = (path / CONFIG_NAME).is_file() and not (path / CONFIG).is_file()
    if lone and loading.round is not None:
        raise InputError(f"--round: {path} is one adapter; name the run's directory instead")
    try:
        subject = find_subject(loading)
    except InputError as error:
        if not lone or loading.base or loading.models:
            raise
        return Origin(loading.name, path, load_adapter(path), ADAPTER, None, str(error))
    if not subject.adapters:
        raise InputError(
            f"{loading.name}: is a model and holds no update; name a run, its round-N or final, or "
            "a PEFT directory"
        )
    model = _chosen(subject, loading.models)
    where = subject.adapters[model]
    return Origin(loading.name, where, load_adapter(where), model, subject)


def _chosen(subject: Subject, wanted: Sequence[str]) -> str:
    """Which of the subject's adapters is meant."""
    if wanted:
        (name,) = subject.chosen(tuple(wanted[:1]), [])[:1]
        if name not in subject.adapters:
            raise InputError(f"--model: {name} is no adapter; there are {_names(subject)}")
        return name
    for name in (GLOBAL, ADAPTER):
        if name in subject.adapters:
            return name
    if len(subject.adapters) > 1:
        raise InputError(
            f"{subject.name}: has a model for every client and no global one; choose one by "
            f"--model: {_names(subject)}"
        )
    return next(iter(subject.adapters))


def _names(subject: Subject) -> str:
    return ", ".join(subject.adapters)


@dataclass(frozen=True)
class HeldOut:
    """Rows to measure losses on.

    Args:
        rows: tokenised.
        total: how many there were to take them from.
        where: what they are, in words.
        batch_size: rows at once.
    """

    rows: Sequence[Tokens]
    total: int
    where: str
    batch_size: int = 8

    @property
    def as_json(self) -> dict[str, Any]:
        """What losses were measured on, as a program reads it."""
        return {"where": self.where, "rows": len(self.rows), "of": self.total}


def held_out(
    origin: Origin, eval_file: Path | None, limit: int | float, tokenizer: Any
) -> HeldOut | None:
    """The rows of a file, or those the run itself holds out; None where there are none.

    Args:
        origin: whose template and labels are used.
        eval_file: rows of the user's.
        limit: how many at most, or a share.
        tokenizer: of the model.

    Raises:
        InputError: rows that cannot be used.
    """
    subject = origin.needed()
    if eval_file is not None:
        rows = read_rows(str(eval_file))
        changes = {
            "eval_file": str(eval_file),
            "client_overrides": None,
            "client_eval_fraction": 0.0,
            "partition_column": None,
            "max_train_samples": 1,
            "max_eval_samples": None,
        }
        if not subject.of_a_run:
            changes["template"] = "auto"
        config = subject.config.model_copy(update=changes)
        raw = RawData([rows], [eval_file.name], rows, eval_file.name)
        data = load_data(
            config, tokenizer, raw, classify=origin.classifies, label_names=origin.labels
        )
        every, where = data.eval, eval_file.name
    elif subject.of_a_run:
        every, where = tokenized(resolve_paths(subject.config))[2].eval, "the run's held-out rows"
    else:
        return None
    batch_size = subject.config.per_device_eval_batch_size if subject.of_a_run else 8
    return HeldOut(first(every, limit), len(every), where, batch_size) if every else None


def with_adapters(subject: Subject, adapters: dict[str, Path]) -> Subject:
    """The subject with these adapters in the place of its own, to load them on one base."""
    return replace(subject, adapters=adapters)
