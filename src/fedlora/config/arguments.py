"""Reads what stands on a command line: a verb's options, and configuration keys.

A verb says in its `SYNTAX` what it takes. The parser, the shell completion and the tests of the
help texts read it from there. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora.errors import InputError


@dataclass(frozen=True)
class Option:
    """An option of a verb, or what stands in front of its options.

    Args:
        what: what to give, in a few words ("" for nothing to say).
        flag: it takes no value.
        many: it takes several values, separated by spaces.
        values: words that can be given, where these are known.
        path: "file" or "directory" where a path is given.
    """

    what: str = ""
    flag: bool = False
    many: bool = False
    values: tuple[str, ...] = ()
    path: str = ""


TRUTH = ("true", "false")


@dataclass(frozen=True)
class Syntax:
    """What a verb takes.

    Args:
        options: by name, without the dashes. `--json` and `--help` belong to every verb.
        first: what stands before the options; None: nothing does.
        keys: it takes the keys of a configuration as options too.
    """

    options: Mapping[str, Option] = field(default_factory=dict)
    first: Option | None = None
    keys: bool = False


CONFIGURATION = Option("a configuration, or embedded", values=("embedded",), path="file")
"""What stands first with verbs that read a configuration."""


def take_flag(arguments: list[str], flag: str) -> bool:
    """Whether `flag` stands among the arguments; it is taken out of them."""
    for token in arguments:
        if _underscored(token) == flag:
            arguments.remove(token)
            return True
    return False


def _underscored(token: str) -> str:
    """`--dry-run` is the same as `--dry_run`."""
    return "--" + token[2:].replace("-", "_") if token.startswith("--") else token


def take_value(arguments: list[str], flag: str, what: str) -> str | None:
    """The value after `flag`, or None; both are taken out of the arguments.

    Raises:
        InputError: the flag has no value; `what` says what to give.
    """
    for i, token in enumerate(arguments):
        name, _, value = token.partition("=")
        if _underscored(name) == flag:
            del arguments[i]
            if not value and i < len(arguments) and not arguments[i].startswith("--"):
                value = arguments.pop(i)
            if not value:
                raise InputError(f"{flag}: give {what}")
            return value
    return None


def take(arguments: list[str], syntax: Syntax) -> dict[str, Any]:
    """The verb's own options with one value or none; they are taken out of the arguments.

    Returns:
        Every such option: its value or None, and for a flag whether it stands there.

    Raises:
        InputError: an option has no value.
    """
    return {
        name: take_flag(arguments, f"--{name}")
        if option.flag
        else take_value(arguments, f"--{name}", option.what)
        for name, option in syntax.options.items()
        if not option.many
    }


def parse_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    """`--key value ...` as flat keys; several values make a list, none means true.

    Raises:
        InputError: a value without a key, or a key given twice.
    """
    out: dict[str, Any] = {}
    key, values = "", list[str]()

    def close() -> None:
        if key:
            if key in out:
                raise InputError(f"--{key} is given twice")
            plain = [None if v.lower() in ("none", "null") else v for v in values]
            out[key] = True if not plain else plain[0] if len(plain) == 1 else plain

    for token in tokens:
        if token.startswith("--") and len(token) > 2:
            close()
            key, _, value = token[2:].partition("=")
            key, values = key.replace("-", "_"), [value] if value or "=" in token else []
            if not key:
                raise InputError(f"{token!r}: expected --key value")
        elif not key:
            raise InputError(f"{token!r}: expected --key value; the configuration file comes first")
        else:
            values.append(token)
    close()
    return out
