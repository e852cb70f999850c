"""Reads the command lines of `fedlora eval` and `fedlora generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.arguments import TRUTH, Option, parse_overrides
from fedlora.errors import InputError
from fedlora.text import nearest

MODELS = ("base", "global", "clients", "all", "adapter")
"""Names of models to choose from, beside `client-0`, `client-1` ..."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loading:
    """What to load and how.

    Args:
        name: a run, a PEFT or model directory, a hub name, or `embedded`.
        base: another base model than the one an adapter names.
        round: which round of a run; None: the final one, or the newest that is whole.
        models: base, global, client-K ...; empty: a verb's own choice.
        dtype, use_cpu, num_threads: as in a configuration; None: the run's own.
        chat_template_path: as in a configuration.
        trust_remote_code: run code that comes with the model.
    """

    name: str
    base: str | None = None
    round: int | None = None
    models: tuple[str, ...] = ()
    dtype: str | None = None
    use_cpu: bool | None = None
    num_threads: int | None = None
    chat_template_path: str | None = None
    trust_remote_code: bool | None = None


MODEL_OR_RUN = Option(
    "a run, a PEFT or model directory, a hub name, or embedded",
    values=("embedded",),
    path="directory",
)
LOADING = {
    "base": Option("another base model", path="directory"),
    "round": Option("a round of the run"),
    "dtype": Option("of the base", values=DTYPES),
    "device": Option("where to compute", values=("cpu", "cuda")),
    "use_cpu": Option("stay on the CPU", values=TRUTH),
    "num_threads": Option("of torch"),
    "chat_template_path": Option("another chat template", path="file"),
    "trust_remote_code": Option("run code that comes with the model", values=TRUTH),
}
"""Keys both verbs take."""


class Given:
    """Flat keys of a command line, read one by one with their types.

    Args:
        verb: for messages.
        arguments: `MODEL_OR_RUN --key value ...`.
        known: keys there are.

    Raises:
        InputError: no model, an unknown key, one given twice.
    """

    def __init__(self, verb: str, arguments: Sequence[str], known: Mapping[str, Option]) -> None:
        if not arguments or arguments[0].startswith("--"):
            raise InputError(
                f"{verb}: name a run's directory, a PEFT or model directory, a hub name or "
                f"embedded; see fedlora {verb} --help"
            )
        self.name = arguments[0]
        self.values: Mapping[str, Any] = parse_overrides(arguments[1:])
        for key in self.values:
            if key not in known:
                raise InputError(
                    f"--{key}: fedlora {verb} has no such option"
                    + nearest(key, known, f"; it has {', '.join('--' + k for k in known)}")
                )

    def text(self, key: str) -> str | None:
        """One value, or None.

        Raises:
            InputError: none stands behind the key, or several.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if value is True or isinstance(value, list):
            raise InputError(f"--{key}: give one value")
        return str(value)

    def listed(self, key: str) -> tuple[str, ...]:
        """All values."""
        value = self.values.get(key)
        if value is None:
            return ()
        if value is True:
            raise InputError(f"--{key}: give at least one value")
        values = value if isinstance(value, list) else [value]
        return tuple("none" if item is None else str(item) for item in values)

    def flag(self, key: str) -> bool:
        """Whether it stands there alone, or with true."""
        return bool(self.truth(key))

    def truth(self, key: str) -> bool | None:
        """True, false, or None where it is not given."""
        value = self.values.get(key)
        if value is None or value is True:
            return value
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in known:
            raise InputError(f"--{key}: {value!r}: expected true or false")
        return known[str(value).lower()]

    def whole(self, key: str, least: int = 1) -> int | None:
        """A whole number of at least `least`, or None.

        Raises:
            InputError: it is none.
        """
        text = self.text(key)
        if text is None:
            return None
        if not text.isdecimal() or int(text) < least:
            raise InputError(f"--{key}: {text!r}: expected a whole number of at least {least}")
        return int(text)

    def limit(self) -> int | float | None:
        """`--limit`: a number of items, or a share of them below 1.

        Raises:
            InputError: it is neither.
        """
        text = self.text("limit")
        if text is None:
            return None
        if text.isdecimal() and int(text):
            return int(text)
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise InputError(f"--limit: {text!r}: expected a number of items, or a share below 1")
        return share

    def file(self, key: str) -> Path | None:
        """A file that is there, or None.

        Raises:
            InputError: it is not there.
        """
        text = self.text(key)
        if text is None:
            return None
        if not Path(text).is_file():
            raise InputError(f"--{key}: {text}: no such file")
        return Path(text)

    def loading(self, models: Sequence[str]) -> Loading:
        """The keys of `LOADING`.

        Raises:
            InputError: an impossible value.
        """
        dtype, device = self.text("dtype"), self.text("device")
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"--dtype: {dtype!r} is none of {', '.join(DTYPES)}")
        if device not in (None, "cpu", "cuda"):
            raise InputError(f"--device: {device!r}: expected cpu or cuda")
        use_cpu = self.truth("use_cpu")
        if device is not None:
            use_cpu = device == "cpu"
        return Loading(
            self.name,
            base=self.text("base"),
            round=self.whole("round", 0),
            models=tuple(models),
            dtype=dtype,
            use_cpu=use_cpu,
            num_threads=self.whole("num_threads"),
            chat_template_path=self.text("chat_template_path"),
            trust_remote_code=self.truth("trust_remote_code"),
        )


def first(items: Sequence[Any], limit: int | float | None) -> Sequence[Any]:
    """The first `limit` items, or that share of them, rounded up as the harness does."""
    if limit is None:
        return items
    number = int(limit) if limit >= 1 else -int(-len(items) * limit // 1)
    return items[:number]
