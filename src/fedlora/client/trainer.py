"""Trains the adapters of one client or several by AdamW, with the base frozen.

The arithmetic is that of transformers' Trainer: the loss of a step is the mean over all labelled
tokens of its micro-batches, gradients are clipped by their global norm, the schedule is one of
transformers'. Batches, dropout and schedule depend on `(seed, round, client)` alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import torch

from fedlora.client.local_run import FLOAT16_SCALE, LocalRun, TrainingJob
from fedlora.client.local_training import LocalTraining, TrainFunction
from fedlora.client.optimizer import undecayed_names
from fedlora.config.train_function import load_train_function
from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.model.client_rows import MixedRowsError, mix_seed
from fedlora.model.lora_layer import ClientTerm
from fedlora.model.passes import PackedRunner, PassResult, runner_of
from fedlora.model.torch_generator import borrowed_generator


def train_together(model: Any, jobs: Sequence[TrainingJob]) -> list[dict[str, Any]]:
    """Local steps of several clients, step by step in one forward and backward pass.

    Each client's result is that of training it alone on the same batches, up to rounding: its loss
    is the mean over its own tokens, and batches, dropout, clipping, optimiser, schedule and number
    of steps are its own. A client that has done its steps leaves the pass.

    Args:
        model: with the clients' adapters in the slots of its layers, in the order of `jobs`.
        jobs: of the clients, at least one.

    Returns:
        For each job what `train` returns. `seconds` is the job's share, by its tokens, of the
        passes it took part in.

    Raises:
        ValueError: no rows, or nothing to train.
        MixedRowsError: several clients, and an architecture that mixes their rows.
    """
    runner, undecayed = runner_of(model), undecayed_names(model)
    if len(jobs) > 1 and not runner.joint:
        raise MixedRowsError("this architecture trains one client at a time")
    half = any(p.dtype == torch.float16 for p in model.parameters())
    scale = FLOAT16_SCALE if half else None
    runs = [LocalRun(job, undecayed, scale) for job in jobs]
    device = jobs[0].parameters[0][1].device
    gpus = [device] if device.type == "cuda" else []
    model.train()
    with contextlib.ExitStack() as stack:
        if not runner.joint:
            # This architecture draws from torch's own generator (or may do so) and trains alone.
            stack.enter_context(borrowed_generator(gpus, runs[0].stream))
        step = 0
        while active := [run for run in runs if run.begin()]:
            _take_step(model, runner, runs, active, step)
            step += 1
    model.eval()
    return [run.metrics() for run in runs]


def _take_step(
    model: Any,
    runner: PackedRunner,
    runs: Sequence[LocalRun],
    active: Sequence[LocalRun],
    step: int,
) -> None:
    """One optimiser step of the clients that still have steps to do.

    In float16 a client whose gradients overflow computes the step again with a smaller scale; the
    others keep theirs.
    """
    began = time.perf_counter()
    waiting = active
    while waiting:
        _add_gradients(model, runner, runs, waiting, step)
        waiting = [run for run in waiting if run.overflows()]
    for run in active:
        run.end()
    _book_time(active, time.perf_counter() - began)


def _add_gradients(
    model: Any,
    runner: PackedRunner,
    runs: Sequence[LocalRun],
    active: Sequence[LocalRun],
    step: int,
) -> None:
    """Add the gradients of the active clients' losses in a step, micro-batch by micro-batch.

    A client's loss is the mean over all labelled tokens of the step. So each micro-batch adds the
    sum over its own tokens, divided by the number of labelled tokens in the whole step.
    """
    for number in range(max(len(run.micro_batches) for run in active)):
        # A client that has nothing to do keeps its slot, with no rows in it.
        parts = [run.rows(number) if run in active else [] for run in runs]
        scales = [run.loss_scale for run in runs]
        weights = [x / max(run.labelled, 1) for x, run in zip(scales, runs, strict=True)]
        seeds = [mix_seed(mix_seed(run.stream, step), number) for run in runs]
        result = runner.backward(model, parts, weights, seeds if runner.joint else None)
        _book_pass(runs, parts, scales, result)


def _book_pass(
    runs: Sequence[LocalRun],
    parts: Sequence[Sequence[Tokens]],
    scales: Sequence[float],
    result: PassResult,
) -> None:
    """Add a pass to the runs' figures; computed tokens are shared by the tokens each run had."""
    tokens = [sum(len(row["input_ids"]) for row in part) for part in parts]
    for run, loss, own, scale in zip(runs, result.losses, tokens, scales, strict=True):
        run.loss += loss / scale
        run.computed += result.computed * own / sum(tokens)


def _book_time(active: Sequence[LocalRun], seconds: float) -> None:
    """Share a step's time among the runs that took it, by their tokens."""
    tokens = sum(run.step_tokens for run in active)
    for run in active:
        run.seconds += seconds * run.step_tokens / tokens


def train(model: Any, dataset: Sequence[Tokens], training: LocalTraining) -> dict[str, Any]:
    """Train the parameters of `model` that require gradients, in place.

    With `theta` all that is trained and `theta_0` its start, the loss of a step is
    `sum_tokens CE / tokens + mu/2 ||theta - theta_0||^2` (FedProx, arXiv 1812.06127); for a
    classifier rows stand for tokens.

    Args:
        model: a transformers causal language model or sequence classifier with adapters.
        dataset: tokenised rows, at least one.
        training: its settings.

    Returns:
        loss (mean over the steps), loss_first, loss_last, steps, tokens (without padding),
        padding (share of padding tokens) and seconds.

    Raises:
        ValueError: no rows, or nothing to train.
    """
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    terms = [m for m in model.modules() if isinstance(m, ClientTerm)]
    return train_together(model, [TrainingJob(parameters, dataset, training, terms)])[0]


def training_of(name: str | None, given: TrainFunction) -> TrainFunction:
    """The local training: the one that was given, else the one that a configuration names.

    Args:
        name: the key `train_function`.
        given: in Python; fedlora's own where nothing was given.

    Raises:
        InputError: both are given, or there is no function of this name.
    """
    if name is None:
        return given
    named = load_train_function(name)
    if given is not train and given is not named:
        raise InputError(
            f"train_function: {name} is named in the configuration, and another one was given in "
            "Python; leave one of them out"
        )
    return named


OWN_NAME = "fedlora.train.train"
"""The name of the package's own training in checkpoints, which stays the same if modules move."""


def name_of_trainer(function: Any) -> str:
    """The name of a local training in checkpoints: a run is resumed with the same one only."""
    if function is train:
        return OWN_NAME
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{function.__module__}.{name}"
