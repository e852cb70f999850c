"""Writes series to TensorBoard, Weights & Biases and Trackio, each by its own library.

As with transformers' Trainer, the libraries' own environment variables hold (WANDB_MODE,
WANDB_ENTITY, TRACKIO_DIR, TRACKIO_SPACE_ID ...). WANDB_PROJECT takes precedence over `project`;
TENSORBOARD_LOGGING_DIR is used where `logging_dir` is not set.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from fedlora.config.config import Config
from fedlora.runs.tracker_series import Values


class Tracker(Protocol):
    """What every tracker does: take figures of a round or of a step, and close."""

    def round(self, values: Values, number: int) -> None: ...

    def steps(self, values: Values, step: int) -> None: ...

    def close(self, succeeded: bool) -> None: ...


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with.

    Args:
        config: the run's.
        output_dir: the run's directory.
        hyperparameters: the flat configuration, as JSON can hold it.
        resumed_from: the round after which it goes on; None in a new run.
        global_step: steps before that.
        notes: what the tracker wrote down about itself when the run began; it may write more.
    """

    config: Config
    output_dir: Path
    hyperparameters: dict[str, Any]
    resumed_from: int | None
    global_step: int
    notes: dict[str, Any]

    @property
    def name(self) -> str:
        return self.config.run_name or self.output_dir.resolve().name


class TensorBoard:
    """Writes event files that TensorBoard shows."""

    def __init__(self, opening: Opening) -> None:
        module = import_module("torch.utils.tensorboard")
        given = opening.config.logging_dir or os.environ.get("TENSORBOARD_LOGGING_DIR")
        logging_dir = Path(given).expanduser() if given else opening.output_dir / "runs"
        resumed = opening.resumed_from
        # What was logged after the round that the run goes on from is purged. A purge reaches all
        # series of a directory, and these two count in rounds and in steps: hence two directories.
        self.rounds = module.SummaryWriter(
            str(logging_dir), purge_step=None if resumed is None else resumed + 1
        )
        self.local = module.SummaryWriter(
            str(logging_dir / "steps"),
            purge_step=None if resumed is None else opening.global_step + 1,
        )
        if "logging_dir" not in opening.notes:
            text = json.dumps(opening.hyperparameters, indent=2)
            self.rounds.add_text("config", f"```json\n{text}\n```", 0)
            self._hyperparameters(opening)
        opening.notes["logging_dir"] = str(logging_dir)

    def _hyperparameters(self, opening: Opening) -> None:
        # SummaryWriter.add_hparams would make another run below this one, so it is not used.
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


class Wandb:
    """Writes to a run of Weights & Biases."""

    def __init__(self, opening: Opening) -> None:
        wandb = import_module("wandb")
        self.users_own = wandb.run is not None  # begun by the user, who will finish it
        settings: dict[str, Any] = {}
        if "WANDB_CONSOLE" not in os.environ:
            settings["console"] = "off"  # progress bars are no log
        known = getattr(wandb.Settings, "model_fields", {})
        if "finish_timeout" in known and "WANDB_FINISH_TIMEOUT" not in os.environ:
            settings["finish_timeout"] = 300  # without a network it would wait for ever
        self.run = wandb.run or wandb.init(
            project=os.environ.get("WANDB_PROJECT") or opening.config.project,
            name=opening.name,
            id=opening.notes.get("id"),
            resume="allow",
            settings=wandb.Settings(**settings),
        )
        opening.notes["id"] = self.run.id
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
        if not self.users_own:
            self.run.finish(exit_code=0 if succeeded else 1)


class Trackio:
    """Writes to a run of Trackio."""

    def __init__(self, opening: Opening) -> None:
        self.trackio, notes = import_module("trackio"), opening.notes
        first = opening.resumed_from is None or "name" not in notes
        name = opening.name if first else notes["name"]
        self.run = self._init(opening, name, "never" if first else "allow")
        if not first and notes.get("id") not in (None, self.run.id):
            # Another run has taken the name since: that one would be continued.
            self._finish()
            name = f"{name}-{secrets.token_hex(2)}"
            self.run = self._init(opening, name, "never")
        notes |= {"name": name, "id": self.run.id}

    def _init(self, opening: Opening, name: str, resume: str) -> Any:
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


BACKENDS: dict[str, Callable[[Opening], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}
