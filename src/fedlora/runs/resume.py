"""Checks that a run goes on with the configuration it began with."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from fedlora.config.clients import client_ranks, overrides_of, settled_overrides
from fedlora.config.config import Config
from fedlora.config.keys import Mark, keys_marked
from fedlora.config.site import SITE_KEYS
from fedlora.config.yaml_file import read_yaml
from fedlora.errors import InputError
from fedlora.methods import METHODS
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.file_names import CONFIG, FINAL
from fedlora.runs.planning.fitting import MICRO_BATCH


def as_it_began(path: Path, config: Config | None) -> Config:
    """The configuration in a run's directory; the one given must not differ.

    Raises:
        InputError: key by key, what differs.
    """
    saved = _saved(path)
    if config is None:
        return saved
    config = config.model_copy(update={"output_dir": str(path)})
    if saved.engine == "workers" and "engine" not in config.model_fields_set:
        config = config.model_copy(update={"engine": "workers"})  # the run may have chosen it
    automatic, now = keys_marked(Config, Mark.AUTOMATIC), resolve_paths(config)
    names = [*keys_marked(Config, Mark.OUTPUT, Mark.CARRIER)]
    if saved.trains_at_sites != now.trains_at_sites:
        names += SITE_KEYS  # what the sites had in their own files, or will have
    free = {key: getattr(now, key) for key in names}
    saved = saved.model_copy(
        update={key: x for key, x in free.items() if not (key in automatic and x == "auto")}
    )
    if now.client_ranks == "auto":
        now = _with_what_was_fitted(now, saved)
    # The saved run holds a rank for every client, whichever key they came from.
    ours = settled_overrides(now, client_ranks(now, saved.num_clients or 0)).flat()
    theirs = saved.flat()
    different = [
        f"  {key}: {theirs.get(key)!r} when it began, {value!r} now"
        for key, value in ours.items()
        if theirs.get(key) != value and not (key in automatic and value in (None, "auto"))
    ]
    if different:
        raise InputError(_differs(path, different, saved, now.num_rounds - saved.num_rounds))
    return saved


def _with_what_was_fitted(now: Config, saved: Config) -> Config:
    """A configuration with `client_ranks: auto` as the run has decided it: ranks, micro-batches.

    All other settings of single clients stay those that are given now.
    """
    ours, theirs = overrides_of(now), overrides_of(saved)
    overrides = {
        client: {
            **{k: x for k, x in ours.get(client, {}).items() if k not in MICRO_BATCH},
            **{k: x for k, x in theirs.get(client, {}).items() if k in MICRO_BATCH},
        }
        for client in {**ours, **theirs}
    }
    fitted = {"client_ranks": saved.client_ranks, "client_overrides": overrides or None}
    return now.model_copy(update=fitted)


def _differs(path: Path, different: Sequence[str], saved: Config, more: int) -> str:
    """What to say of a configuration that is not the one a run began with.

    Args:
        path: the run's directory.
        different: a line for each key.
        saved: the configuration it began with.
        more: how many more rounds are asked for.
    """
    advice = f"\nWhen it has ended: {further(path, saved, more)}" if more > 0 else ""
    return (
        f"--resume {path}: the configuration differs from the one the run began with:\n"
        + "\n".join(different)
        + "\nLeave these keys as they were, or start a new run in another --output_dir"
        + advice
    )


def refuse_complete(path: Path, config: Config | None) -> None:
    """Refuse to go on with a run that has ended, and say how its result is trained further.

    Args:
        path: its directory.
        config: what it was asked to go on with, perhaps with more rounds; None: as it began.

    Raises:
        InputError: the run has ended.
    """
    if not (path / CONFIG).is_file() or not (path / FINAL).is_dir():
        return
    advice = ""
    with contextlib.suppress(InputError):  # a damaged configuration is no way to go on
        saved = _saved(path)
        more = config.num_rounds - saved.num_rounds if config else 0
        advice = f".\n{further(path, saved, more if more > 0 else saved.num_rounds)}"
    raise InputError(f"--resume {path}: nothing to resume; the run is complete{advice}")


def further(path: Path, saved: Config, rounds: int) -> str:
    """How to train for more rounds than a run was begun with: its number of rounds is fixed.

    Args:
        path: the run's directory.
        saved: its configuration.
        rounds: how many more.
    """
    if METHODS[saved.method].training(saved.rule_options()).keeps:
        return (
            f"For more rounds begin a new run with --num_rounds {saved.num_rounds + rounds}: with "
            f"method {saved.method} every client keeps a model of its own, which a new run does "
            "not take up"
        )
    words = ["fedlora", "run", path / CONFIG, "--init_adapter", path / FINAL]
    words += ["--num_rounds", rounds, "--output_dir", f"{path}-more"]
    return (
        f"For {rounds} more rounds start a new run from its result (rounds count from 1 "
        f"again{_what_begins_anew(saved)}):\n  {shlex.join(map(str, words))}"
    )


def _what_begins_anew(saved: Config) -> str:
    """What a new run does not take over from the old one, with the comma before it, or ""."""
    anew = []
    if saved.lr_scheduler_scope == "federation":
        anew.append("the learning rate's schedule")
    if saved.server_momentum > 0:
        anew.append("the server's momentum")
    if not anew:
        return ""
    return f", and {' and '.join(anew)} {'begins' if len(anew) == 1 else 'begin'} anew"


def _saved(path: Path) -> Config:
    return Config(**{**read_yaml(path / CONFIG), "output_dir": str(path)})
