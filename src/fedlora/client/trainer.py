"""Trains the adapters of one client or several by AdamW, with the base frozen.

The arithmetic is that of transformers' Trainer: the loss of a step is the mean over all labelled
tokens of its micro-batches, gradients are clipped by their global norm, the schedule is one of
transformers'. Batches, dropout and schedule depend on `(seed, round, client)` alone.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora.data.tokenize import Tokens
from fedlora.model.batches import count_labelled
from fedlora.model.client_rows import MixedRowsError, mix_seed
from fedlora.model.lora_layer import ClientTerm
from fedlora.model.passes import PackedRunner, PassResult, runner_of
from fedlora.model.torch_generator import borrowed_generator
from fedlora.seeds import Purpose, generator, integer

StepCallback = Callable[[int, int, float, int], None]
"""Called after each step with `(step, steps, loss, tokens)`; tokens without padding."""


@dataclass(frozen=True)
class LocalTraining:
    """What a client may spend in one round. Names are those of `Config`.

    Args:
        client, round, seed: name the random streams.
        num_rounds: length of the federation, for a schedule that spans it.
        tail_penalty, tail_from: what a rule asks for, see `methods.rule.Training`.
        on_step: told about every step.
    """

    client: int = 0
    round: int = 1
    seed: int = 42
    num_rounds: int = 1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "linear"
    lr_scheduler_scope: str = "round"
    warmup_steps: float = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    num_train_epochs: float = 1.0
    max_steps: int = -1
    proximal_mu: float = 0.0
    tail_penalty: float = 0.0
    tail_from: float = 1.0
    on_step: StepCallback | None = field(default=None, compare=False)

    def steps(self, num_rows: int) -> int:
        """Optimiser steps of one round over so many rows."""
        if self.max_steps > 0:
            return self.max_steps
        batches = math.ceil(num_rows / self.per_device_train_batch_size)
        per_epoch = math.ceil(batches / self.gradient_accumulation_steps)
        return math.ceil(self.num_train_epochs * per_epoch)


Budget = LocalTraining
"""The public name of earlier versions; in privacy, a budget is an epsilon."""

TrainFunction = Callable[[Any, Sequence[Tokens], LocalTraining], Mapping[str, Any]]
"""`(model, dataset, budget) -> metrics`: trains the parameters that require gradients, in place."""


def batches(
    dataset: Sequence[Tokens], budget: LocalTraining, steps: int
) -> Iterator[list[list[Tokens]]]:
    """For every step its micro-batches: shuffled epochs, cut as transformers' Trainer cuts them."""
    size, accumulate = budget.per_device_train_batch_size, budget.gradient_accumulation_steps
    rng = generator(budget.seed, budget.round, budget.client, Purpose.BATCHES)
    done = 0
    while done < steps:
        order = rng.permutation(len(dataset)).tolist()
        epoch = [[dataset[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
        for at in range(0, len(epoch), accumulate):
            if done == steps:
                return
            yield epoch[at : at + accumulate]
            done += 1


def schedule(budget: LocalTraining, steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at a step (from 0) of this round."""
    from transformers import get_scheduler

    whole = budget.lr_scheduler_scope == "federation"
    total = steps * budget.num_rounds if whole else steps
    offset = steps * (budget.round - 1) if whole else 0
    warmup = budget.warmup_steps
    warmup = math.ceil(total * warmup) if warmup < 1 else int(warmup)
    unused = torch.optim.SGD([torch.zeros(1)], lr=budget.learning_rate)
    made = get_scheduler(
        budget.lr_scheduler_type, unused, num_warmup_steps=warmup, num_training_steps=total
    )
    factor = made.lr_lambdas[0]
    return lambda step: float(factor(offset + step))


_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def _undecayed(model: Any) -> Callable[[str], bool]:
    """Whether a parameter, by its name, is a bias or belongs to a norm: it has no weight decay."""
    norms = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm))
    return lambda name: bool(_UNDECAYED.search(name.lower())) or name.startswith(norms)


def tail_penalty(terms: Sequence[ClientTerm], budget: LocalTraining) -> Tensor:
    """`lambda sum_modules ||s B[:, t:]|| ||A[t:]||`, HetLoRA's rank penalty (arXiv 2401.06432)."""
    tails = [term.tail(budget.tail_from) for term in terms]
    return budget.tail_penalty * torch.stack([t for t in tails if t is not None]).sum()


class FlatParameters:
    """Parameters as one vector, and their gradients as another: a step is a handful of operations.

    The parameters become views of the vector; their values stay.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.value = torch.cat([p.detach().reshape(-1) for p in parameters])
        self.value.grad = torch.zeros_like(self.value)
        at = 0
        for p in parameters:
            p.data = self.value[at : at + p.numel()].view_as(p)
            p.grad = self.value.grad[at : at + p.numel()].view_as(p)
            at += p.numel()


@dataclass(frozen=True)
class Trainee:
    """One of the clients that train in one pass.

    Args:
        parameters: what it trains, by name; no two clients share one.
        dataset: its tokenised rows, at least one.
        budget: what it may spend.
        terms: its adapters in the layers, for HetLoRA's penalty.
    """

    parameters: Sequence[tuple[str, torch.nn.Parameter]]
    dataset: Sequence[Tokens]
    budget: LocalTraining
    terms: Sequence[ClientTerm] = ()


FLOAT16_SCALE = 2.0**6
"""What the gradient of a token's loss is multiplied by beside a base in float16. Without it the
mean over many tokens underflows; with much more, deep models overflow."""
FLOAT16_LEAST = 2.0**-8
"""Below this it is not the scale that overflows, but the model."""


class LocalRun:
    """One client's training in a round: its optimiser, its batches, and what they gave so far.

    Args:
        trainee: whose.
        undecayed: which parameters have no weight decay.
        scale: beside a base in float16, of the gradient of a token's loss; else None.
    """

    def __init__(
        self, trainee: Trainee, undecayed: Callable[[str], bool], scale: float | None
    ) -> None:
        budget, self.trainee = trainee.budget, trainee
        if not len(trainee.dataset) or not trainee.parameters:
            raise ValueError("training needs at least one row and one parameter")
        self.steps = budget.steps(len(trainee.dataset))
        self.factor = schedule(budget, self.steps)
        self.batches = batches(trainee.dataset, budget, self.steps)
        self.flats, self.optimizer = _optimizer(trainee.parameters, undecayed, budget)
        self.anchors = [f.value.clone() for f in self.flats] if budget.proximal_mu else []
        self.stream = integer(budget.seed, budget.round, budget.client, Purpose.DROPOUT)
        self.scale = scale
        # Of the step that runs: its rows, the number of labelled tokens in them, and its loss.
        self.micro_batches: list[list[Tokens]] = []
        self.labelled, self.loss = 0, 0.0
        # Of all steps: tokens without padding, tokens computed (padding among them), its time.
        self.losses = list[float]()
        self.tokens, self.computed, self.computed_before, self.seconds = 0, 0.0, 0.0, 0.0

    @property
    def loss_scale(self) -> float:
        """What the step's loss is multiplied by, beside a base in float16.

        It is a power of two, so that dividing by it again is exact, near `scale` times the number
        of labelled tokens, so that what flows through the base is of the size of a token's loss.
        """
        if self.scale is None:
            return 1.0
        return self.scale * 2.0 ** math.floor(math.log2(max(self.labelled, 1)))

    def overflows(self) -> bool:
        """Whether the step's gradients do; they are then dropped, and a smaller scale is taken."""
        grads = [flat.value.grad for flat in self.flats]
        if self.scale is None or self.scale < FLOAT16_LEAST or not math.isfinite(self.loss):
            return False
        if all(bool(g.isfinite().all()) for g in grads if g is not None):
            return False
        self.optimizer.zero_grad(set_to_none=False)
        self.scale, self.loss, self.computed = self.scale / 16, 0.0, self.computed_before
        return True

    def begin(self) -> bool:
        """Take the next step's micro-batches; whether there is one."""
        self.micro_batches = next(self.batches, [])
        self.labelled = sum(count_labelled(rows) for rows in self.micro_batches)
        self.loss, self.computed_before = 0.0, self.computed
        return bool(self.micro_batches)

    def rows(self, number: int) -> Sequence[Tokens]:
        """The micro-batch of this number, if this step has it."""
        return self.micro_batches[number] if number < len(self.micro_batches) else []

    @property
    def step_tokens(self) -> int:
        """Tokens of the step that runs, without padding."""
        return sum(len(row["input_ids"]) for rows in self.micro_batches for row in rows)

    def end(self) -> None:
        """Finish the step: the other terms of the loss, clipping, the optimiser, the figures."""
        budget, step = self.trainee.budget, len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = budget.learning_rate * self.factor(step)
        self._finish_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.losses.append(self.loss)
        self.tokens += self.step_tokens
        if budget.on_step:
            budget.on_step(step + 1, self.steps, self.loss, self.step_tokens)

    def _finish_gradients(self) -> None:
        """Undo the scale, add the rank penalty and FedProx's term, clip by the global norm.

        FedProx's `mu/2 ||theta - theta_0||^2` enters by its gradient `mu (theta - theta_0)` alone:
        it is no part of the loss that is reported.
        """
        budget, values = self.trainee.budget, [flat.value for flat in self.flats]
        if self.scale is not None:
            for value in values:
                assert value.grad is not None
                value.grad.mul_(1 / self.loss_scale)
        if budget.tail_penalty:
            penalty = tail_penalty(self.trainee.terms, budget)
            penalty.backward()
            self.loss += float(penalty.detach())
        for value, anchor in zip(values, self.anchors, strict=bool(self.anchors)):
            assert value.grad is not None
            value.grad.add_(value - anchor, alpha=budget.proximal_mu)
        if budget.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(values, budget.max_grad_norm)

    def metrics(self) -> dict[str, Any]:
        """What `train` returns."""
        return {
            "loss": sum(self.losses) / len(self.losses),
            "loss_first": self.losses[0],
            "loss_last": self.losses[-1],
            "steps": len(self.losses),
            "tokens": self.tokens,
            "padding": 1 - self.tokens / self.computed,
            "seconds": self.seconds,
        }


def _optimizer(
    parameters: Sequence[tuple[str, torch.nn.Parameter]],
    undecayed: Callable[[str], bool],
    budget: LocalTraining,
) -> tuple[list[FlatParameters], torch.optim.Optimizer]:
    """AdamW over one vector for each dtype, device and whether weights decay."""
    kinds: dict[Any, list[torch.nn.Parameter]] = {}
    for name, p in parameters:
        kinds.setdefault((undecayed(name), p.dtype, p.device), []).append(p)
    flats = [FlatParameters(alike) for alike in kinds.values()]
    groups = [
        {"params": [flat.value], "weight_decay": 0.0 if free else budget.weight_decay}
        for (free, *_), flat in zip(kinds, flats, strict=True)
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=budget.learning_rate,
        betas=(budget.adam_beta1, budget.adam_beta2),
        eps=budget.adam_epsilon,
        fused=True,
    )
    return flats, optimizer


def train_together(model: Any, trainees: Sequence[Trainee]) -> list[dict[str, Any]]:
    """Local steps of several clients, step by step in one forward and backward pass.

    Each client's result is that of training it alone on the same batches, up to rounding: its loss
    is the mean over its own tokens, and batches, dropout, clipping, optimiser, schedule and number
    of steps are its own. A client that has done its steps leaves the pass.

    Args:
        model: with the clients' adapters in the slots of its layers, in the order of `trainees`.
        trainees: at least one.

    Returns:
        For each what `train` returns; `seconds` is its share, by tokens, of the passes it took
        part in.

    Raises:
        ValueError: no rows, or nothing to train.
        MixedRowsError: several clients, and an architecture that mixes their rows.
    """
    runner, undecayed = runner_of(model), _undecayed(model)
    if len(trainees) > 1 and not runner.joint:
        raise MixedRowsError("this architecture trains one client at a time")
    half = any(p.dtype == torch.float16 for p in model.parameters())
    scale = FLOAT16_SCALE if half else None
    runs = [LocalRun(trainee, undecayed, scale) for trainee in trainees]
    device = trainees[0].parameters[0][1].device
    gpus = [device] if device.type == "cuda" else []
    model.train()
    with contextlib.ExitStack() as stack:
        if not runner.joint:
            # This architecture draws from torch's own generator (or may do so), and trains alone.
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
    """The gradients of the active clients' losses in a step, micro-batch by micro-batch.

    A client's loss is the mean over all labelled tokens of the step, so each micro-batch adds the
    sum over its own tokens divided by the step's number of them.
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
    """Book a pass: losses, and the computed tokens by the tokens each client had in it."""
    tokens = [sum(len(row["input_ids"]) for row in part) for part in parts]
    for run, loss, own, scale in zip(runs, result.losses, tokens, scales, strict=True):
        run.loss += loss / scale
        run.computed += result.computed * own / sum(tokens)


def _book_time(active: Sequence[LocalRun], seconds: float) -> None:
    """Book a step's time, by tokens."""
    tokens = sum(run.step_tokens for run in active)
    for run in active:
        run.seconds += seconds * run.step_tokens / tokens


def train(model: Any, dataset: Sequence[Tokens], budget: LocalTraining) -> dict[str, Any]:
    """Train the parameters of `model` that require gradients, in place.

    With `theta` all that is trained and `theta_0` its start, the loss of a step is
    `sum_tokens CE / tokens + mu/2 ||theta - theta_0||^2` (FedProx, arXiv 1812.06127); for a
    classifier rows stand for tokens.

    Args:
        model: a transformers causal language model or sequence classifier with adapters.
        dataset: tokenised rows, at least one.
        budget: what may be spent.

    Returns:
        loss (mean over the steps), loss_first, loss_last, steps, tokens (without padding),
        padding (share of padding tokens) and seconds.

    Raises:
        ValueError: no rows, or nothing to train.
    """
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    terms = [m for m in model.modules() if isinstance(m, ClientTerm)]
    return train_together(model, [Trainee(parameters, dataset, budget, terms)])[0]


OWN_NAME = "fedlora.train.train"
"""What checkpoints call the package's own training, wherever its module lies."""


def name_of_trainer(function: Any) -> str:
    """By what a checkpoint knows a local training, so that a run goes on with the same one."""
    if function is train:
        return OWN_NAME
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{function.__module__}.{name}"
