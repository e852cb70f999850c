"""Finds out what is to be evaluated, a run, an adapter or a model, and where its parts lie."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.adapters.peft_files import CONFIG_NAME, OLDER_NAME, WEIGHTS_NAME, read_adapter_config
from fedlora.commands.eval.options import Loading
from fedlora.config.clients import overrides_of
from fedlora.config.config import Config
from fedlora.config.yaml_file import read_yaml
from fedlora.embedded import BASE_DIR, EMBEDDED
from fedlora.errors import CheckpointError, InputError
from fedlora.methods import METHODS
from fedlora.model.quantisation import bits_of
from fedlora.model.sources import Source
from fedlora.runs.file_names import CONFIG, FINAL, METRICS
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.safe_writing import verify
from fedlora.runs.session import model_source
from fedlora.text import natural

BASE, GLOBAL, ADAPTER = "base", "global", "adapter"
_ROUND = re.compile(r"^round-(\d+)$")
_CLIENT = re.compile(r"^client-(\d+)$")


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Args:
        name: as the user names it.
        config: the run's, or one made of the options.
        source: the base model.
        adapters: model name (global, client-K, adapter) -> its PEFT directory.
        run: the run that results belong to; None: they go to a directory of their own.
        round: the round of the run's global model.
        of_a_run: `config` is a run's, so its template and its rows are known.
        tokenizer: a directory with a tokenizer of its own; None: the configuration's.
        notes: what the user should know.
    """

    name: str
    config: Config
    source: Source
    adapters: Mapping[str, Path]
    run: Path | None = None
    round: int = 0
    of_a_run: bool = False
    tokenizer: Path | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def models(self) -> list[str]:
        """All there are: the base first, clients last."""
        return [BASE, *self.adapters]

    @property
    def clients(self) -> list[str]:
        """The clients' own models."""
        return [name for name in self.adapters if _CLIENT.match(name)]

    @property
    def classifies(self) -> bool:
        """Whether it guesses labels instead of writing text."""
        return self.config.lora_task_type == "SEQ_CLS" or self.source.classifier

    def chosen(self, wanted: tuple[str, ...], default: list[str]) -> list[str]:
        """Model names as asked for (`clients`: all of them), in the order they are asked for.

        Raises:
            InputError: there is no such model here.
        """
        out: list[str] = []
        for name in wanted:
            if name == "clients" and self.clients:
                out += self.clients
            elif name == "all":
                out += self.models
            elif name in self.models:
                out.append(name)
            else:
                raise InputError(_no_such_model(name, self))
        return list(dict.fromkeys(out)) or default

    def fingerprint(self, model: str) -> str:
        """Of what decides a model's answers: the base's name and the adapter's bytes."""
        digest = hashlib.sha256(f"{self.source.name}|{self.source.revision}".encode())
        digest.update(self.config.dtype.encode())
        if model != BASE:
            for name in (CONFIG_NAME, WEIGHTS_NAME, OLDER_NAME):
                if (path := self.adapters[model] / name).is_file():
                    with path.open("rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]


def _no_such_model(name: str, subject: Subject) -> str:
    message = f"{name}: no such model of {subject.name}; there are {', '.join(subject.models)}"
    if (_CLIENT.match(name) or name == "clients") and not subject.clients:
        message += (
            "; clients' own models are kept with save_client_models: true, or by method fedsa"
        )
    elif name == GLOBAL and subject.run and subject.clients:
        message += "; this method makes a model for every client and no global one"
    return message


def find_subject(loading: Loading) -> Subject:
    """Find out what the user names; no weights are read.

    Raises:
        InputError: there is no such thing, or the base model cannot be found.
    """
    name, path = loading.name, Path(loading.name)
    if name == EMBEDDED:
        return _model(loading)
    if (path / CONFIG).is_file():
        return _run(path, loading)
    if path.is_dir():
        if (path / CONFIG_NAME).is_file() or _clients_in(path):
            return _adapters(path, loading)
        if (path / "config.json").is_file():
            return _model(loading)
        raise InputError(
            f"{name}: holds no run ({CONFIG}), no adapter ({CONFIG_NAME}) and no model "
            "(config.json)"
        )
    if path.exists():
        raise InputError(f"{name}: is a file; name a directory, a hub name or embedded")
    if name.startswith((".", os.sep, "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such directory")
    return _model(loading)


def _with(config: Config, loading: Loading, base: str | None) -> Config:
    """The configuration with what the command line says over it."""
    values = {
        "model_name_or_path": base,
        "dtype": loading.dtype,
        "use_cpu": loading.use_cpu,
        "num_threads": loading.num_threads,
        "chat_template_path": loading.chat_template_path,
        "trust_remote_code": loading.trust_remote_code,
    }
    given = {key: value for key, value in values.items() if value is not None}
    return config.model_copy(update=given)


def _model(loading: Loading) -> Subject:
    """A model by itself, by its directory or its hub name."""
    if loading.base:
        raise InputError(f"--base: {loading.name} is a model itself; --base belongs to an adapter")
    if loading.round is not None:
        raise InputError(f"--round: {loading.name} is a model, and no run with rounds")
    config = _with(Config(), loading, loading.name)
    try:
        source = model_source(config)
    except InputError as error:
        if Path(loading.name).is_dir():
            raise
        why = str(error).removeprefix(f"model_name_or_path: {loading.name}: ")
        raise InputError(f"{loading.name}: no directory here, and as a hub name: {why}") from None
    return Subject(loading.name, config, source, {})


# --- runs ---


def _run(path: Path, loading: Loading) -> Subject:
    """A run: its final model, or the round that is asked for, or the newest one that is whole."""
    config = _with(Config(**read_yaml(path / CONFIG)), loading, loading.base)
    notes: list[str] = []
    final, lines = path / FINAL, read_metrics(path) if (path / METRICS).is_file() else []
    ends = [line["final"] for line in lines if line["event"] == "end"]
    saved = _saved_rounds(path)
    number, directory = loading.round, final
    if final.is_dir() and number in (None, *ends[-1:]):
        number = ends[-1] if ends else max(saved, default=0)
    elif number is not None:
        if number not in saved:
            state_alone = (path / f"round-{number}").is_dir()
            what = (
                f"no adapter in round-{number}" if state_alone else f"no round-{number} (any more)"
            )
            key = (
                "save_adapter_rounds decides which hold one"
                if state_alone
                else ("save_total_limit decides how many are kept")
            )
            raise InputError(
                f"--round {number}: {path} holds {what}; there are "
                + (", ".join(map(str, saved)) or "none")
                + f"; {key}"
            )
        directory = path / f"round-{number}"
        _check_whole(directory)
    else:
        number = _newest(path, saved, notes)
        directory = path / f"round-{number}"
        notes.append(f"the run is not complete; this is its state after round {number}")
    notes += notes_on_bits(config)
    has_global = (directory / CONFIG_NAME).is_file() and not _is_personal(config)
    adapters = ({GLOBAL: directory} if has_global else {}) | _clients_in(directory)
    return Subject(
        str(path),
        config,
        model_source(config),
        adapters,
        run=path,
        round=number,
        of_a_run=True,
        notes=tuple(notes),
    )


def _is_personal(config: Config) -> bool:
    """Whether clients keep a part of the model, so that what the server holds is no whole model."""
    return bool(METHODS[config.method].training(config.rule_options()).keeps)


def notes_on_bits(config: Config) -> list[str]:
    """What to know of a run whose clients trained beside a quantised base: none is used here.

    Args:
        config: of the run.

    Returns:
        A sentence for each number of bits.
    """
    number = config.num_clients or 1  # one stands for all where their number is not known
    clients = dict[int, list[int]]()
    for client in range(number):
        own = config.of_client(client) if client in overrides_of(config) else config
        if (bits := bits_of(own)) is not None:
            clients.setdefault(bits, []).append(client)
    notes = []
    for held, numbers in clients.items():
        who = f"client {', '.join(map(str, numbers))} " if len(numbers) < number else ""
        notes.append(
            f"{who}trained beside the base in {held} bits; here the base is as it was saved"
        )
    return notes


def _saved_rounds(path: Path) -> list[int]:
    """Numbers of the rounds of which a run's directory holds an adapter, ascending."""
    parts = [part for part in path.iterdir() if (part / CONFIG_NAME).is_file()]
    matches = (_ROUND.match(part.name) for part in parts)
    return sorted(int(match.group(1)) for match in matches if match)


def _check_whole(path: Path) -> None:
    """Refuse a round whose files are damaged or incomplete."""
    try:
        verify(path)
    except CheckpointError as error:
        raise InputError(f"{error}; choose another --round") from None


def _newest(path: Path, saved: list[int], notes: list[str]) -> int:
    """The newest round whose files are whole; `notes` gets a line on each newer one."""
    for number in reversed(saved):
        try:
            verify(path / f"round-{number}")
        except CheckpointError as error:
            notes.append(str(error))
        else:
            return number
    if not saved and any(_ROUND.match(part.name) for part in path.iterdir()):
        raise InputError(
            f"{path}: no round holds an adapter yet; save_adapter_rounds decides which do, and "
            "final holds one when the run is complete"
        )
    raise InputError(f"{path}: the run has no whole round yet; wait for the first one")


def _clients_in(path: Path) -> dict[str, Path]:
    """`client-K` -> its PEFT directory, of all below this one."""
    names = sorted((p.name for p in path.iterdir() if _CLIENT.match(p.name)), key=natural)
    return {name: path / name for name in names if (path / name / CONFIG_NAME).is_file()}


# --- adapters ---


def _adapters(path: Path, loading: Loading) -> Subject:
    """A PEFT directory by itself, or a part of a run's directory."""
    if loading.round is not None:
        raise InputError(f"--round: {path} is one adapter; name the run's directory instead")
    run = _run_around(path)
    run_config = Config(**read_yaml(run / CONFIG)) if run else Config()
    adapters = {ADAPTER: path} if (path / CONFIG_NAME).is_file() else {}
    if run and _is_personal(run_config) and not _CLIENT.match(path.name):
        adapters = {}
    adapters |= _clients_in(path)
    if not adapters:
        raise InputError(
            f"{path}: method {run_config.method} makes a model for every client, and what the "
            f"server holds after a round is no model of anybody; name {run}, whose final/ has the "
            "clients' models"
        )
    saved = read_adapter_config(next(iter(adapters.values())))
    base = loading.base or (None if run else str(saved.get("base_model_name_or_path") or ""))
    if base == "":
        raise InputError(
            f"{path / CONFIG_NAME}: names no base model (base_model_name_or_path); give --base"
        )
    config = _with(run_config, loading, base)
    if saved.get("task_type") == "SEQ_CLS":
        config = config.model_copy(update={"lora_task_type": "SEQ_CLS"})
    if not run and not loading.base and saved.get("revision"):
        config = config.model_copy(update={"model_revision": saved["revision"]})
    if config.model_name_or_path == str(BASE_DIR):
        config = config.model_copy(update={"model_name_or_path": EMBEDDED})
    try:
        source = model_source(config)
    except InputError as error:
        raise InputError(f"{error}; --base names another base model") from None
    tokenizer = path if (path / "tokenizer_config.json").is_file() else None
    return Subject(
        str(path),
        config,
        source,
        adapters,
        of_a_run=run is not None,
        tokenizer=tokenizer,
        notes=tuple(notes_on_bits(run_config)),
    )


def _run_around(path: Path) -> Path | None:
    """The run whose `round-N`, `final` or `final/client-K` this is."""
    return next((p for p in list(path.resolve().parents)[:2] if (p / CONFIG).is_file()), None)
