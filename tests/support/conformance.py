"""What has to come of a run, whoever carries its messages: checks with a carrier as a parameter.

A carrier is `(keys, output_dir, events, callbacks) -> Result`, a whole run of flat keys in which
`train_file` matches a file for each client. A further engine brings one, and calls the checks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from fedlora.config.config import Config
from fedlora.engines.local import run
from fedlora.methods import METHODS
from fedlora.runs.events import Event
from fedlora.runs.results import Result
from support.courses import tensor_files
from support.rows import rows, write_jsonl

Keys = dict[str, Any]
Callbacks = Sequence[Callable[[Any], None]]


QUICK = ("exact", "flora", "rolora", "hetlora", "fedsa")
"""Rules that differ most in what travels: a sum and its turn, stacks, one factor at a time, ranks
that are pruned, factors that a client keeps."""


def rules(*but: str) -> list[Any]:
    """All rules but some, as parameters of a test of a carrier that does not look at its messages.

    That a rule's messages hold all it needs is shown over sites, by every rule. Of a carrier of
    opaque bytes the rules of `QUICK` show as much, and the others are slow.
    """
    return [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in METHODS
        if name not in but
    ]


class Carrier(Protocol):
    """Takes a whole run."""

    def __call__(
        self, keys: Keys, out: Path, events: list[Event] | None = None, callbacks: Callbacks = ()
    ) -> Result: ...


def in_memory(
    keys: Keys, out: Path, events: list[Event] | None = None, callbacks: Callbacks = ()
) -> Result:
    """The reference: all clients train in this process, one after the other."""
    hear = events.append if events is not None else (lambda event: None)
    config = Config(**{**keys, "output_dir": str(out)})
    return run(config, callbacks=callbacks, report=hear)


def three_clients(small_run: Keys) -> Keys:
    """Three clients of ranks 8, 4 and 2, five rounds of one step each; nothing is evaluated."""
    files = small_run["train_file"].replace("site_*", "site_[0-2]")
    own = {key: x for key, x in small_run.items() if key != "eval_file"}
    return {
        **own,
        "train_file": files,
        "client_ranks": [8, 4, 2],
        "num_rounds": 5,
        "max_steps": 1,
        "cohort_size": 1,
        "dtype": "float32",
        "use_cpu": True,
    }


def for_rule(keys: Keys, method: str) -> Keys:
    """The run under another rule; one rank for all where it needs that."""
    mixed = METHODS[method].mixed_ranks
    if method != "exact":  # five rounds show what `exact` makes of a dense S
        keys = {**keys, "num_rounds": 3}
    return {**keys, "method": method, **({} if mixed else {"client_ranks": [4, 4, 4]})}


def classifier(keys: Keys, directory: Path) -> Keys:
    """The run with labelled texts and a head, of which the last client knows two labels alone."""
    directory.mkdir()
    for client, labels in enumerate(("ab", "bc", "ca")):
        table = [
            {"text": row["prompt"], "label": labels[i % 2]}
            for i, row in enumerate(rows(8, 8 * client))
        ]
        write_jsonl(directory / f"site_{client}.jsonl", table)
    labelled = {"label_column_name": "label", "label_names": ["a", "b", "c"]}
    return {**keys, "train_file": str(directory / "site_[0-2].jsonl"), **labelled}


def with_settings_of_clients(keys: Keys) -> Keys:
    """The run with settings of single clients, one of which trains other modules."""
    own = {1: {"learning_rate": 1e-3, "lora_target_modules": ["q_proj"]}, 2: {"max_steps": 2}}
    return {**keys, "client_overrides": own, "lora_target_modules": ["q_proj", "v_proj"]}


def lines_of(result: Result) -> list[Any]:
    """The lines of a run's rounds as JSON has them, without what depends on the clock."""
    out = []
    for line in result.metrics:
        if line["event"] == "round":
            clients = [{**c, "metrics": c["metrics"].get("loss")} for c in line["clients"]]
            out.append({**line, "clients": clients, "seconds": None})
    return json.loads(json.dumps(out))  # type: ignore[no-any-return]


def assert_same(one: Result, other: Result) -> None:
    """The same tensors in every file, and the same lines."""
    assert tensor_files(one.output_dir) == tensor_files(other.output_dir)
    assert lines_of(one) == lines_of(other)


@dataclass(frozen=True)
class Outcome:
    """What a run gave: the digests of its tensor files, and the lines of its rounds."""

    files: dict[str, str]
    lines: list[Any]

    @classmethod
    def of(cls, result: Result) -> Outcome:
        return cls(tensor_files(result.output_dir), lines_of(result))


_REFERENCES: dict[str, Outcome] = {}
"""Outcomes of the reference by its keys: every carrier is compared with one and the same run."""


def reference(keys: Keys, directory: Path) -> Outcome:
    """What the run gives in this process, made once of the same keys and read again after that."""
    name = repr(sorted((key, repr(x)) for key, x in keys.items() if key != "output_dir"))
    if name not in _REFERENCES:
        _REFERENCES[name] = Outcome.of(in_memory(keys, directory))
    return _REFERENCES[name]


def check_same_bytes(carrier: Carrier, keys: Keys, directory: Path) -> None:
    """A run gives the bytes of the reference."""
    found = Outcome.of(carrier(keys, directory / "carried"))
    wanted = reference(keys, directory / "memory")
    assert found.files == wanted.files
    assert found.lines == wanted.lines


def check_goes_on(
    carrier: Carrier,
    resume: Callable[[Path], Result],
    keys: Keys,
    directory: Path,
    stops: Sequence[int],
) -> None:
    """A server that is killed goes on from its last commit, to the same end.

    Args:
        carrier: takes the run until it is killed.
        resume: goes on with it.
        keys: of the run.
        directory: for what is written.
        stops: numbers of the events at which the server is killed, run by run.
    """
    wanted = reference(keys, directory / "quiet")
    for stop in stops:
        out, events = directory / f"killed at {stop}", Killing(stop)
        try:
            result = carrier(keys, out, events)
        except KeyboardInterrupt:
            result = resume(out)
        assert Outcome.of(result).files == wanted.files


class Killing(list[Event]):
    """Events that are listened to until one of them kills the listener."""

    def __init__(self, stop: int) -> None:
        super().__init__()
        self.stop = stop

    def append(self, event: Event) -> None:
        if len(self) == self.stop:
            raise KeyboardInterrupt
        super().append(event)
