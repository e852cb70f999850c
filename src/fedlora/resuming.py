"""Checks that a run goes on with the configuration it began with."""

from __future__ import annotations

from pathlib import Path

from fedlora.clients import client_ranks, settled_overrides
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.setup import AUTOMATIC, resolve_paths
from fedlora.sources import read_yaml


def as_it_began(path: Path, config: Config | None) -> Config:
    """The configuration in a run's directory; the one given must not differ.

    Raises:
        InputError: key by key, what differs.
    """
    saved = Config(**{**read_yaml(path / "config.yaml"), "output_dir": str(path)})
    if config is None:
        return saved
    shown = {
        key: getattr(config, key) for key in ("report_to", "run_name", "project", "logging_dir")
    }
    saved = saved.model_copy(update=shown)  # who is told changes nothing of the run
    now = resolve_paths(config.model_copy(update={"output_dir": str(path)}))
    # The saved run holds a rank for every client, whichever key they came from.
    ours = settled_overrides(now, client_ranks(now, saved.num_clients or 0)).flat()
    theirs = saved.flat()
    automatic = set(AUTOMATIC)
    different = [
        f"  {key}: {theirs.get(key)!r} when it began, {value!r} now"
        for key, value in ours.items()
        if theirs.get(key) != value and not (key in automatic and value in (None, "auto"))
    ]
    if different:
        raise InputError(
            f"--resume {path}: the configuration differs from the one the run began with:\n"
            + "\n".join(different)
            + "\nLeave these keys as they were, or start a new run in another --output_dir"
        )
    return saved
