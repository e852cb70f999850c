"""Finds the model and the tokenizer that a user names, and says what is there where none is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.data.templates import BUILT_IN_CHAT
from fedlora.errors import InputError


@dataclass(frozen=True)
class Source:
    """Where a base model comes from.

    Args:
        name: hub name or directory, as `from_pretrained` takes it.
        config: its configuration, of transformers.
        classifier: whether the checkpoint is a sequence classifier already.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model.
    """

    name: str
    config: Any
    classifier: bool
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of a classifier's checkpoint by id; transformers' `LABEL_7` counts as 7."""
        own = sorted((int(i), str(name)) for i, name in (self.config.id2label or {}).items())
        return tuple(str(i) if name == f"LABEL_{i}" else name for i, name in own)


def find_source(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Read a model's configuration, and none of its weights.

    Raises:
        InputError: there is no such model, or its architecture is unknown.
    """
    from transformers import AutoConfig

    check_place("model_name_or_path", name)
    with in_one_line(f"model_name_or_path: {name}: the model cannot be loaded", name):
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    kinds = getattr(config, "architectures", None) or []
    classifier = any(str(kind).endswith("ForSequenceClassification") for kind in kinds)
    return Source(name, config, classifier, revision, trust_remote_code)


def load_tokenizer(
    source: Source,
    name: str | None = None,
    chat_template: str | None = None,
    generates: bool = True,
) -> Any:
    """The model's tokenizer, or another, with a padding token.

    Args:
        source: the model.
        name: another tokenizer than the model's own.
        chat_template: a Jinja file, a tokenizer (hub name or directory) that has one, or a name of
            `BUILT_IN_CHAT`.
        generates: the model writes text, so there has to be an end-of-text token.

    Raises:
        InputError: a tokenizer cannot be loaded, has no chat template or no end-of-text token.
    """
    if name:
        tokenizer = _tokenizer("tokenizer_name", name, None, source)
    else:
        tokenizer = _tokenizer("model_name_or_path", source.name, source.revision, source)
    where = name or source.name
    if tokenizer.eos_token_id is None and generates:
        raise InputError(f"{where}: the tokenizer has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"{where}: the tokenizer has no padding token (pad_token)")
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template:
        tokenizer.chat_template = _chat_template(chat_template, source)
    return tokenizer


def _tokenizer(key: str, name: str, revision: str | None, source: Source) -> Any:
    """A tokenizer of transformers; a complaint names the key it came from."""
    from transformers import AutoTokenizer

    check_place(key, name)
    with in_one_line(f"{key}: {name}: the tokenizer cannot be loaded", name):
        return AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=source.trust_remote_code
        )


def _chat_template(given: str, source: Source) -> Any:
    """The text of a chat template: built in, in a Jinja file, or that of another tokenizer."""
    path = BUILT_IN_CHAT.get(given, Path(given))
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat_template_path: {path}: cannot be read: {error}") from None
    template = getattr(_tokenizer("chat_template_path", given, None, source), "chat_template", None)
    if not template:
        raise InputError(f"chat_template_path: {given} has no chat template")
    return template


def label_order(source: Source, names: Sequence[str]) -> tuple[str, ...]:
    """The labels in the order of their ids: the checkpoint's where it has just these labels."""
    if source.classifier and sorted(source.labels) == sorted(names):
        return source.labels
    return tuple(names)


# --- what is not there ---


def check_place(key: str, name: str, holds: str | None = None) -> None:
    """Refuse what can only be a path and is no directory, and so is no name on the hub.

    Args:
        key: of the configuration.
        name: its value.
        holds: the file it must hold, where it is a directory and never a name on the hub.

    Raises:
        InputError: that there is no such directory, and what is near.
    """
    path = Path(name)
    if path.is_dir():
        return
    if path.is_file():
        if key == "chat_template_path":
            return
        raise InputError(f"{key}: {name} is a file; give the directory that it lies in")
    if holds is None and re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", name, re.ASCII):
        return
    lacks = f"holds no {holds}: " if holds else ""
    raise InputError(f"{key}: {name}: {lacks}there is no such directory{_near(path)}")


def _near(path: Path) -> str:
    """What there is in the place of a path that does not exist."""
    if str(path).startswith("~") and path.expanduser().exists():
        return f"; ~ stands for your home in a shell alone: give {path.expanduser()}"
    inside = next((p for p in path.parents if p.is_dir()), Path())
    missing = path.relative_to(inside).parts if path.is_relative_to(inside) else path.parts
    try:
        directories = sorted(p.name for p in inside.iterdir() if p.is_dir() and p.name[0] != ".")
    except OSError:
        directories = []
    close = difflib.get_close_matches(missing[0] if missing else "", directories, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {inside / close[0]}?"
    some = ", ".join(directories[:5]) + (" ..." if len(directories) > 5 else "")
    return f"; {inside.absolute()} has {some or 'no directories'}"


@contextmanager
def in_one_line(what: str, name: str | None = None) -> Iterator[None]:
    """Whatever a library raises in here becomes one line for the user.

    Args:
        what: the beginning of the line.
        name: on the hub or a directory; where it is none, the line says so.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        where = ""
        if name is not None and not Path(name).exists():
            where = f" (there is no directory {name} either{_near(Path(name))})"
        raise InputError(f"{what}: {_beginning(error)}{where}") from None


def _beginning(error: Exception) -> str:
    """The beginning of a library's message, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
