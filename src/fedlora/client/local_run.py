"""Takes one client through the steps of a round, around the passes that give its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.client.local_training import LocalTraining, batches, schedule
from fedlora.client.optimizer import make_optimizer
from fedlora.data.tokenize import Tokens
from fedlora.model.batches import count_labelled
from fedlora.model.lora_layer import ClientTerm
from fedlora.seeds import Purpose, integer


@dataclass(frozen=True)
class TrainingJob:
    """What one client trains in a round, on what, and how.

    Args:
        parameters: what it trains, by name; clients that train together share none.
        dataset: its tokenised rows, at least one.
        training: its settings.
        terms: its adapters in the layers, for HetLoRA's penalty.
    """

    parameters: Sequence[tuple[str, torch.nn.Parameter]]
    dataset: Sequence[Tokens]
    training: LocalTraining
    terms: Sequence[ClientTerm] = ()


FLOAT16_SCALE = 2.0**6
"""Loss scale of one token where the base is in float16. With less, the gradient of a mean over many
tokens underflows; with much more, deep models overflow."""
FLOAT16_LEAST = 2.0**-8
"""Smallest loss scale that is tried: below it, the model itself overflows."""


class LocalRun:
    """One client's training in a round: its optimiser, its batches and its figures so far.

    Args:
        job: what the client trains.
        undecayed: whether the parameter of a name has no weight decay.
        scale: loss scale of one token where the base is in float16; else None.

    Raises:
        ValueError: no rows, or nothing to train.
    """

    def __init__(
        self, job: TrainingJob, undecayed: Callable[[str], bool], scale: float | None
    ) -> None:
        training, self.job = job.training, job
        if not len(job.dataset) or not job.parameters:
            raise ValueError("training needs at least one row and one parameter")
        self.steps = training.steps(len(job.dataset))
        self.factor = schedule(training, self.steps)
        self.batches = batches(job.dataset, training, self.steps)
        self.flats, self.optimizer = make_optimizer(job.parameters, undecayed, training)
        self.anchors = [f.value.clone() for f in self.flats] if training.proximal_mu else []
        self.stream = integer(training.seed, training.round, training.client, Purpose.DROPOUT)
        self.scale = scale
        # Of the step that runs: its rows, the number of labelled tokens in them, and its loss.
        self.micro_batches: list[list[Tokens]] = []
        self.labelled, self.loss = 0, 0.0
        # Of all steps: tokens without padding, tokens computed (padding among them), its time.
        self.losses = list[float]()
        self.tokens, self.computed, self.computed_before, self.seconds = 0, 0.0, 0.0, 0.0

    @property
    def loss_scale(self) -> float:
        """What the step's loss is multiplied by; 1 unless the base is in float16.

        The loss is a mean over tokens, so the scale is about `scale` times their number: what flows
        backwards through the base is then as large as for the loss of one token. It is a power of
        two, so that dividing by it afterwards is exact.
        """
        if self.scale is None:
            return 1.0
        return self.scale * 2.0 ** math.floor(math.log2(max(self.labelled, 1)))

    def overflows(self) -> bool:
        """Whether the step's gradients overflow float16.

        If so, they are dropped and the scale is lowered: the step has to be computed again.
        """
        grads = [flat.value.grad for flat in self.flats]
        if self.scale is None or self.scale < FLOAT16_LEAST or not math.isfinite(self.loss):
            return False
        if all(bool(g.isfinite().all()) for g in grads if g is not None):
            return False
        self.optimizer.zero_grad(set_to_none=False)
        self.scale, self.loss, self.computed = self.scale / 16, 0.0, self.computed_before
        return True

    def begin(self) -> bool:
        """Take the micro-batches of the next step; False if there is none."""
        self.micro_batches = next(self.batches, [])
        self.labelled = sum(count_labelled(rows) for rows in self.micro_batches)
        self.loss, self.computed_before = 0.0, self.computed
        return bool(self.micro_batches)

    def rows(self, number: int) -> Sequence[Tokens]:
        """The step's micro-batch of this number; empty if the step has fewer."""
        return self.micro_batches[number] if number < len(self.micro_batches) else []

    @property
    def step_tokens(self) -> int:
        """Tokens of the step that runs, without padding."""
        return sum(len(row["input_ids"]) for rows in self.micro_batches for row in rows)

    def end(self) -> None:
        """Finish the step: remaining terms of the loss, clipping, the optimiser, the figures."""
        training, step = self.job.training, len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate * self.factor(step)
        self._finish_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.losses.append(self.loss)
        self.tokens += self.step_tokens
        if training.on_step:
            training.on_step(step + 1, self.steps, self.loss, self.step_tokens)

    def _finish_gradients(self) -> None:
        """Undo the scale, add the rank penalty and FedProx's term, clip by the global norm.

        FedProx's `mu/2 ||theta - theta_0||^2` enters by its gradient `mu (theta - theta_0)` alone:
        it is no part of the loss that is reported.
        """
        training, values = self.job.training, [flat.value for flat in self.flats]
        if self.scale is not None:
            for value in values:
                assert value.grad is not None
                value.grad.mul_(1 / self.loss_scale)
        if training.tail_penalty:
            penalty = tail_penalty(self.job.terms, training)
            penalty.backward()
            self.loss += float(penalty.detach())
        for value, anchor in zip(values, self.anchors, strict=bool(self.anchors)):
            assert value.grad is not None
            value.grad.add_(value - anchor, alpha=training.proximal_mu)
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(values, training.max_grad_norm)

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


def tail_penalty(terms: Sequence[ClientTerm], training: LocalTraining) -> Tensor:
    """`lambda sum_modules ||s B[:, t:]|| ||A[t:]||`, HetLoRA's rank penalty (arXiv 2401.06432)."""
    tails = [term.tail(training.tail_from) for term in terms]
    return training.tail_penalty * torch.stack([t for t in tails if t is not None]).sum()
