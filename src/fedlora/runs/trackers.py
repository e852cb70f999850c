"""Reports a run's figures to TensorBoard, Weights & Biases and Trackio (`report_to`).

Series by round: `eval/*` (the global evaluation), `general/*` (held-out general text), `privacy/*`,
`train/*` (loss, aggregation error, norm of the update, bytes ...), `seconds/*`, and for each client
`client/K/*` (loss, steps ...), `client/K/eval_*` and `client/K/personal_*`. While clients train,
`steps/client/K/loss` by `train/global_step`: steps of the longest client of every round before,
and this round's. TensorBoard shows these as a run of their own, `steps`.

As with transformers' Trainer, the libraries' own environment variables hold (WANDB_MODE,
WANDB_ENTITY, TRACKIO_DIR, TRACKIO_SPACE_ID ...). WANDB_PROJECT goes before `project`,
TENSORBOARD_LOGGING_DIR says where if `logging_dir` does not.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedlora.config.config import TRACKERS, Config
from fedlora.errors import InputError
from fedlora.runs.events import Event
from fedlora.runs.file_names import METRICS
from fedlora.runs.metrics_log import read_metrics
from fedlora.text import first_line, nearest

Values = dict[str, float]


KEPT = "trackers.json"
"""By which names and ids a resumed run goes on in the same series."""


LOGGING_STEPS = 10
"""Steps of a client that one point stands for: their mean, as `logging_steps` of transformers."""


MOST_CLIENTS = 256
"""Clients with series of their own; more would drown any dashboard."""


def check_trackers(config: Config) -> list[str]:
    """The names of the trackers that `report_to` asks for.

    Raises:
        InputError: an unknown name, a library that is not installed, or nobody logged in.
    """
    wanted = config.report_to
    if wanted is None or wanted in ("none", ["none"], []):
        return []
    if wanted in ("all", ["all"]):
        names = [name for name in TRACKERS if _installed(name)]
    else:
        names = list(dict.fromkeys([wanted] if isinstance(wanted, str) else wanted))
    for name in names:
        if name not in TRACKERS:
            among = ", ".join(TRACKERS)
            hint = nearest(name, [*TRACKERS, "none", "all"], "")
            raise InputError(f"report_to: {name!r} is none of {among}; or none, or all{hint}")
        if not _installed(name):
            raise InputError(f"report_to: {name} is not installed; pip install 'fedlora[trackers]'")
        try:
            import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except Exception as error:  # whatever a broken installation raises
            raise InputError(
                f"report_to: {name} cannot be imported: {first_line(error)}; "
                "pip install 'fedlora[trackers]'"
            ) from None
    if "wandb" in names:
        _check_login()
    return names


def _installed(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # wandb's own output is a directory `wandb`


def _check_login() -> None:
    """wandb would ask for a key in the middle of a run, or fail there."""
    wandb = import_module("wandb")
    if wandb.run is not None:
        return
    remedy = "`wandb login`, or set WANDB_MODE=offline, or leave wandb out of report_to"
    try:
        online = wandb.setup().settings.mode in ("online", "run", "shared")
        known = not online or wandb.login(prompt=False)
    except Exception as error:
        raise InputError(f"report_to: wandb: {first_line(error)}; {remedy}") from None
    if not known:
        raise InputError(f"report_to: wandb: nobody is logged in; {remedy}")


def _numbers(prefix: str, found: Mapping[str, Any]) -> Values:
    """Every number of `found` that is one, under `prefix`."""
    return {
        f"{prefix}{key}": float(x)
        for key, x in found.items()
        if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
    }


_OF_A_ROUND = (
    "aggregation_error",
    "truncation_error",
    "update_norm",
    "global_rank",
    "bytes_up",
    "bytes_down",
)


def round_values(line: Event) -> Values:
    """A line of `metrics.jsonl` (of event `start` or `round`) as series, name -> value."""
    clients = line.get("clients") or []
    out = _numbers("train/", {key: line.get(key) for key in _OF_A_ROUND})
    weighed = [
        (c["weight"], loss)
        for c in clients
        if c["weight"] and (loss := c["metrics"].get("loss")) is not None
    ]
    if weighed:
        out["train/loss"] = sum(w * loss for w, loss in weighed) / sum(w for w, _ in weighed)
    if clients:
        out["train/clients"] = float(len(clients))
        out["train/rejected"] = float(sum(bool(c.get("rejected")) for c in clients))
    parts = (("eval/", "evaluation"), ("general/", "general_evaluation"), ("privacy/", "privacy"))
    for prefix, key in (*parts, ("seconds/", "seconds")):
        out |= _numbers(prefix, line.get(key) or {})
    for c in clients:
        if c["client"] < MOST_CLIENTS:
            own = {**c["metrics"], "rank": c["rank"], "bytes_up": c["bytes_up"]}
            out |= _numbers(f"client/{c['client']}/", own)
    for prefix, key in (("eval_", "client_evaluations"), ("personal_", "personal_evaluations")):
        for client, found in (line.get(key) or {}).items():
            if int(client) < MOST_CLIENTS:
                out |= _numbers(f"client/{client}/{prefix}", found)
    return out


def longest(line: Event) -> int:
    """Steps of the client that trained longest in a round."""
    return max((int(c["metrics"].get("steps") or 0) for c in line["clients"]), default=0)


class _Tracker(Protocol):
    def round(self, values: Values, number: int) -> None: ...

    def steps(self, values: Values, step: int) -> None: ...

    def close(self, succeeded: bool) -> None: ...


@dataclass(frozen=True)
class _Opening:
    """What a tracker begins with.

    Args:
        config: the run's.
        output_dir: the run's directory.
        hyperparameters: the flat configuration, as JSON can hold it.
        resumed_from: the round after which it goes on; None in a new run.
        global_step: steps before that.
        kept: what the tracker noted about itself when the run began, and notes now.
    """

    config: Config
    output_dir: Path
    hyperparameters: dict[str, Any]
    resumed_from: int | None
    global_step: int
    kept: dict[str, Any]

    @property
    def name(self) -> str:
        return self.config.run_name or self.output_dir.resolve().name


class _TensorBoard:
    def __init__(self, opening: _Opening) -> None:
        module = import_module("torch.utils.tensorboard")
        given = opening.config.logging_dir or os.environ.get("TENSORBOARD_LOGGING_DIR")
        where = Path(given).expanduser() if given else opening.output_dir / "runs"
        resumed = opening.resumed_from
        # What was logged after the round it goes on from is purged; the two have steps of their
        # own kind, and a purge reaches all series of a directory: hence two.
        self.rounds = module.SummaryWriter(
            str(where), purge_step=None if resumed is None else resumed + 1
        )
        self.local = module.SummaryWriter(
            str(where / "steps"), purge_step=None if resumed is None else opening.global_step + 1
        )
        if "logging_dir" not in opening.kept:
            text = json.dumps(opening.hyperparameters, indent=2)
            self.rounds.add_text("config", f"```json\n{text}\n```", 0)
            self._hyperparameters(opening)
        opening.kept["logging_dir"] = str(where)

    def _hyperparameters(self, opening: _Opening) -> None:
        # SummaryWriter.add_hparams makes a run of its own below this one; these belong to it.
        plain = {
            key: x if isinstance(x, bool | int | float | str) else json.dumps(x)
            for key, x in opening.hyperparameters.items()
        }
        metric = opening.config.metric_for_best_model.removeprefix("eval_")
        metrics = dict.fromkeys(["eval/loss", f"eval/{metric}"], None)
        for summary in import_module("torch.utils.tensorboard.summary").hparams(plain, metrics):
            self.rounds.file_writer.add_summary(summary)

    def round(self, values: Values, number: int) -> None:
        for name, value in values.items():
            self.rounds.add_scalar(name, value, number)
        self.rounds.flush()

    def steps(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self.local.add_scalar(name, value, step)

    def close(self, succeeded: bool) -> None:
        self.rounds.close()
        self.local.close()


class _Wandb:
    def __init__(self, opening: _Opening) -> None:
        wandb = import_module("wandb")
        self.theirs = wandb.run is not None  # begun by the user, and the user's to finish
        settings: dict[str, Any] = {}
        if "WANDB_CONSOLE" not in os.environ:
            settings["console"] = "off"  # bars are no log
        known = getattr(wandb.Settings, "model_fields", {})
        if "finish_timeout" in known and "WANDB_FINISH_TIMEOUT" not in os.environ:
            settings["finish_timeout"] = 300  # without a network it would wait for ever
        self.run = wandb.run or wandb.init(
            project=os.environ.get("WANDB_PROJECT") or opening.config.project,
            name=opening.name,
            id=opening.kept.get("id"),
            resume="allow",
            settings=wandb.Settings(**settings),
        )
        opening.kept["id"] = self.run.id
        self.run.config.update(opening.hyperparameters, allow_val_change=True)
        for group in ("eval", "train", "general", "privacy", "seconds", "client"):
            self.run.define_metric(f"{group}/*", step_metric="round")
        for metric in ("round", "train/global_step"):
            self.run.define_metric(metric)
        self.run.define_metric("steps/*", step_metric="train/global_step")

    def round(self, values: Values, number: int) -> None:
        self.run.log({**values, "round": number})

    def steps(self, values: Values, step: int) -> None:
        self.run.log({**values, "train/global_step": step})

    def close(self, succeeded: bool) -> None:
        if not self.theirs:
            self.run.finish(exit_code=0 if succeeded else 1)


class _Trackio:
    def __init__(self, opening: _Opening) -> None:
        self.trackio, kept = import_module("trackio"), opening.kept
        first = opening.resumed_from is None or "name" not in kept
        name = opening.name if first else kept["name"]
        self.run = self._init(opening, name, "never" if first else "allow")
        if not first and kept.get("id") not in (None, self.run.id):
            # Another run took the name since, and it would be continued instead.
            self._finish()
            name = f"{name}-{secrets.token_hex(2)}"
            self.run = self._init(opening, name, "never")
        kept |= {"name": name, "id": self.run.id}

    def _init(self, opening: _Opening, name: str, resume: str) -> Any:
        with redirect_stdout(sys.stderr):  # standard output is the run's own, JSON perhaps
            return self.trackio.init(
                project=opening.config.project,
                name=name,
                config=opening.hyperparameters,
                resume=resume,
                embed=False,
            )

    def _finish(self) -> None:
        with redirect_stdout(sys.stderr):
            self.trackio.finish()

    def round(self, values: Values, number: int) -> None:
        self.run.log(values, step=number)

    def steps(self, values: Values, step: int) -> None:
        self.run.log(values, step=step)

    def close(self, succeeded: bool) -> None:
        self._finish()


_OPEN: dict[str, Callable[[_Opening], _Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


@dataclass
class Trackers:
    """The trackers of a run; one that fails is left out from then on, and the run goes on."""

    config: Config
    output_dir: Path
    names: Sequence[str]
    warn: Callable[[str], None]
    trackers: dict[str, _Tracker] = field(default_factory=dict)
    global_step: int = 0
    longest: int = 0  # step that a client has reached in this round
    sums: dict[int, tuple[float, int]] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "begin":
            self._begin(event)
        elif kind == "step":
            self._step(event)
        elif kind in ("start", "round"):
            values = round_values(event)
            self._each(lambda tracker: tracker.round(values, event["round"]))
            if kind == "round":
                self.global_step += max(self.longest, longest(event))
                self.longest, self.sums = 0, {}

    def _begin(self, event: Event) -> None:
        resumed, kept = event.get("resumed_from"), dict[str, Any]()
        if resumed is not None:
            kept = self._kept()
            if (self.output_dir / METRICS).exists():
                lines = read_metrics(self.output_dir)
                rounds = [x for x in lines if x["event"] == "round" and x["round"] <= resumed]
                self.global_step = sum(longest(line) for line in rounds)
        facts = json.loads(json.dumps(self.config.flat(), default=str))
        if "parameters" in event:
            facts["model/num_parameters"] = event["parameters"]
        for name in self.names:
            own = kept.setdefault(name, {})
            opening = _Opening(self.config, self.output_dir, facts, resumed, self.global_step, own)
            try:
                self.trackers[name] = _OPEN[name](opening)
            except Exception as error:
                self._gone(name, error)
        self._keep({name: own for name, own in kept.items() if own})

    def _kept(self) -> dict[str, Any]:
        try:
            found = json.loads((self.output_dir / KEPT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _keep(self, kept: dict[str, Any]) -> None:
        partial = self.output_dir / f".{KEPT}.partial"
        if not kept:
            return
        try:
            partial.write_text(json.dumps(kept) + "\n", encoding="utf-8")
            partial.replace(self.output_dir / KEPT)
        except OSError as error:
            self.warn(f"report_to: {error}; once resumed, the run begins new series")

    def _step(self, event: Event) -> None:
        client, step, loss = event["client"], event["step"], event["loss"]
        self.longest = max(self.longest, step)
        if client >= MOST_CLIENTS or not self.trackers:
            return
        total, count = self.sums.get(client, (0.0, 0))
        if loss is not None and math.isfinite(loss):
            total, count = total + loss, count + 1
        if count and (step % LOGGING_STEPS == 0 or step == event["steps"]):
            values, at = {f"steps/client/{client}/loss": total / count}, self.global_step + step
            self._each(lambda tracker: tracker.steps(values, at))
            total, count = 0.0, 0
        self.sums[client] = (total, count)

    def _each(self, tell: Callable[[_Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                tell(tracker)
            except Exception as error:  # a network that is gone, a disk that is full
                self._gone(name, error)

    def _gone(self, name: str, error: Exception) -> None:
        self.trackers.pop(name, None)
        self.warn(f"report_to: {name}: {first_line(error)}; it is told nothing more")

    def close(self, name: str, succeeded: bool) -> None:
        """Close a tracker, if it is open."""
        if (tracker := self.trackers.get(name)) is not None:
            try:
                tracker.close(succeeded)
            except Exception as error:
                self._gone(name, error)
