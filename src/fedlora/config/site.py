"""Reads the file of a site: what is its own, and what it lets a server set.

It is read by the light process that supervises a worker, so nothing here imports torch. Values of
the keys that a configuration has too are checked by `Config`, when the worker starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from fedlora.config.table import STRICT, read_table, table
from fedlora.config.train_function import placed
from fedlora.config.yaml_file import read_yaml
from fedlora.errors import InputError
from fedlora.text import nearest

SITE_KEYS = (
    "model_name_or_path",
    "model_revision",
    "tokenizer_name",
    "chat_template_path",
    "trust_remote_code",
    "dtype",
    "load_in_8bit",
    "load_in_4bit",
    "train_file",
    "eval_file",
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "template",
    "prompt_template",
    "completion_template",
    "text_column_names",
    "label_column_name",
    "label_names",
    "max_train_samples",
    "max_eval_samples",
    "client_eval_fraction",
    "use_cpu",
    "num_threads",
    "gradient_checkpointing",
    "train_function",
)
"""Keys of a configuration that are a site's own; what the server says of them does not count.

But for `load_in_8bit` and `load_in_4bit`: where the site names neither, a server's value counts.
"""

_FILES = ("train_file", "eval_file")
_PLACES = ("model_name_or_path", "tokenizer_name", "chat_template_path", "dataset_name")
_LONGEST_NAME = 200  # characters, as in a message
_LONGEST_SOCKET = 107  # bytes of a Unix socket's path on Linux


class Bounds(BaseModel):
    """What a server may set at most; a key that is left out is not bounded."""

    model_config = STRICT

    lora_r: int | None = Field(None, ge=1, description="rank of the adapter")
    max_steps: int | None = Field(None, ge=1, description="steps of a round, counted or of epochs")
    num_train_epochs: float | None = Field(None, gt=0, description="passes over the rows, a round")
    max_length: int | None = Field(None, ge=2, description="tokens of a sample")
    learning_rate: float | None = Field(None, gt=0, description="of the local training")
    lora_target_modules: list[str] | None = Field(
        None, description="modules that may be trained, by the names a server may use"
    )
    model_name_or_path: list[str] | None = Field(
        None, description="names of models that a server may ask for"
    )


class Site(BaseModel):
    """What a site is and has. `settings` holds those of `SITE_KEYS` that were given."""

    model_config = STRICT

    name: str = Field(description="of the site, as the server calls it")
    socket: str = Field("", description="path of its socket; none: worker.sock in state_dir")
    port: int | None = Field(
        None,
        ge=1,
        lt=2**16,
        description="listen on this port of 127.0.0.1 instead; the file `socket` then says how to "
        "call it",
    )
    state_dir: str = Field("", description="what the worker keeps between rounds; none: NAME-state")
    rank: int | None = Field(
        None, ge=1, description="of the adapter that is trained here, whatever the server asks"
    )
    max_rank: int | None = Field(
        None, ge=1, description="train the rank that the server asks, but no higher one than this"
    )
    bounds: Bounds = Field(default_factory=Bounds, description="what a server may set at most")
    settings: dict[str, Any] = Field(default_factory=dict)


OWN_KEYS = tuple(key for key in Site.model_fields if key != "settings")
"""Keys of a site's file that no configuration has."""


def read_site(path: str | Path) -> Site:
    """The file of a site; relative paths in it count from its directory.

    Raises:
        InputError: it is missing or no YAML, a key is unknown, or a value is not possible.
    """
    path = Path(path)
    try:
        return _site(read_yaml(path), path.resolve().parent)
    except InputError as error:
        said = str(error)
        raise InputError(said if said.startswith(str(path)) else f"{path}: {said}") from None


def read_bounds(where: str, values: Any) -> Bounds:
    """The table `bounds` of a file.

    Args:
        where: before every line of an error.
        values: as they stand in the file.

    Raises:
        InputError: a line for every key that cannot be.
    """
    bounds: Bounds = read_table(Bounds, where, table(where.removesuffix(": "), values))
    return bounds


def _site(values: Mapping[str, Any], directory: Path) -> Site:
    for key in values:
        _refuse_unknown(key)
    own = {key: value for key, value in values.items() if key in OWN_KEYS}
    own["bounds"] = read_bounds("bounds: ", own.get("bounds"))
    site: Site = read_table(Site, "", own)
    if not site.name.strip() or len(site.name) > _LONGEST_NAME or not site.name.isprintable():
        raise InputError(f"name: {site.name[:40]!r}: expected a short name of the site")
    if site.rank and site.max_rank:
        raise InputError("rank and max_rank exclude each other; give one of them")
    state_dir = directory / (site.state_dir or f"{site.name.replace(os.sep, '-')}-state")
    socket = str(directory / site.socket if site.socket else state_dir / "worker.sock")
    if site.port is None and len(os.fsencode(socket)) > _LONGEST_SOCKET:
        raise InputError(
            f"socket: {socket} is longer than the {_LONGEST_SOCKET} bytes that a socket's path may "
            "have; give a shorter one"
        )
    return site.model_copy(
        update={
            "socket": socket,
            "state_dir": str(state_dir),
            "settings": {
                key: _placed(key, value, directory)
                for key, value in values.items()
                if key in SITE_KEYS
            },
        }
    )


def _refuse_unknown(key: str) -> None:
    """Refuse a key that is no site's, and name the one that may be meant."""
    known = (*OWN_KEYS, *SITE_KEYS)
    if key in known:
        return
    if key in Bounds.model_fields:
        raise InputError(f"{key}: is the server's to set; a site limits it under `bounds`")
    raise InputError(
        f"{key}: unknown key of a site"
        + nearest(key, known, "; fedlora worker --example shows all of them")
    )


def _placed(key: str, value: Any, directory: Path) -> Any:
    """A value in which a relative path counts from the file's directory; hub names stay."""
    if isinstance(value, str) and key == "train_function":
        return placed(value, directory)
    if not isinstance(value, str) or key not in (*_FILES, *_PLACES):
        return value
    path = directory / value
    return str(path) if key in _FILES or path.exists() else value
