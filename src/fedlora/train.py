"""One client's local steps: AdamW on the adapter, the base frozen.

The arithmetic is that of transformers' Trainer: the loss of a step is the mean over all labelled
tokens of its micro-batches, gradients are clipped by their global norm, the schedule is one of
transformers'. Batches, dropout and schedule depend on `(seed, round, client)` alone.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.model import AdapterLayer
from fedlora.seeds import Purpose, generator, integer
from fedlora.tokens import IGNORE, Tokens

StepCallback = Callable[[int, int, float, int], None]
"""Called after each step with `(step, steps, loss, tokens)`; tokens without padding."""


@dataclass(frozen=True)
class Budget:
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


TrainFunction = Callable[[Any, Sequence[Tokens], Budget], Mapping[str, Any]]
"""`(model, dataset, budget) -> metrics`: trains the parameters that require gradients, in place."""


def batches(dataset: Sequence[Tokens], budget: Budget, steps: int) -> Iterator[list[list[Tokens]]]:
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


def collate(
    rows: Sequence[Tokens], device: torch.device | str = "cpu", pad_token_id: int = 0
) -> dict[str, Tensor]:
    """Rows as right-padded tensors `(batch, longest)`: input_ids, attention_mask, labels.

    A classifier's labels are `(batch,)`; `token_type_ids` go along where rows have them.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filling: int) -> Tensor:
        out = torch.full((len(rows), longest), filling, dtype=torch.long)
        for i, row in enumerate(rows):
            out[i, : len(row[key])] = torch.tensor(row[key])
        return out.to(device)

    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        mask[i, : len(row["input_ids"])] = 1
    batch = {"input_ids": padded("input_ids", pad_token_id), "attention_mask": mask.to(device)}
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded("token_type_ids", 0)
    if "label" in rows[0]:
        batch["labels"] = torch.tensor([row["label"] for row in rows], device=device)
    else:
        batch["labels"] = padded("labels", IGNORE)
    return batch


def pad_token_of(model: Any) -> int:
    """What a model expects as padding; some compute positions and lengths from it."""
    return getattr(getattr(model, "config", None), "pad_token_id", None) or 0


def summed_loss(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The summed cross-entropy, in float32, of the labelled tokens or of a classifier's rows.

    Returns:
        The sum (a scalar), the logits `(n, vocabulary)` of the n labelled tokens or `(n, classes)`
        of the n rows, their labels `(n,)`.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if labels.ndim == 1:
        logits = model(**inputs).logits.float()  # (batch, classes)
    else:
        out = model(**inputs, use_cache=False)
        counted = labels[:, 1:] != IGNORE  # (batch, longest - 1)
        logits = out.logits[:, :-1][counted].float()  # (tokens, vocabulary)
        labels = labels[:, 1:][counted]
    return F.cross_entropy(logits, labels, reduction="sum"), logits, labels


def labelled(rows: Sequence[Tokens]) -> int:
    """What a loss is a mean over: labelled tokens (never a row's first), or a classifier's rows."""
    if rows and "label" in rows[0]:
        return len(rows)
    return sum(label != IGNORE for row in rows for label in row["labels"][1:])


def schedule(budget: Budget, steps: int) -> Callable[[int], float]:
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


def _groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained, biases and norms (of modules trained whole) without weight decay."""
    norms = [f"{name}." for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)]
    decayed, plain = list[Tensor](), list[Tensor]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = _UNDECAYED.search(name.lower()) or name.startswith(tuple(norms))
            (plain if free else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def tail_penalty(model: Any, budget: Budget) -> Tensor:
    """`lambda sum_modules ||s B[:, t:]|| ||A[t:]||`, HetLoRA's rank penalty (arXiv 2401.06432)."""
    tails = [m.tail(budget.tail_from) for m in model.modules() if isinstance(m, AdapterLayer)]
    return budget.tail_penalty * torch.stack([t for t in tails if t is not None]).sum()


def train(model: Any, dataset: Sequence[Tokens], budget: Budget) -> dict[str, Any]:
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
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not len(dataset) or not parameters:
        raise ValueError("training needs at least one row and one parameter")
    device = parameters[0].device
    anchors = [p.detach().clone() for p in parameters] if budget.proximal_mu else []
    steps = budget.steps(len(dataset))
    factor = schedule(budget, steps)
    optimizer = torch.optim.AdamW(
        _groups(model, budget.weight_decay),
        lr=budget.learning_rate,
        betas=(budget.adam_beta1, budget.adam_beta2),
        eps=budget.adam_epsilon,
    )
    padding = pad_token_of(model)
    began, losses, tokens, slots = time.perf_counter(), list[float](), 0, 0
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(integer(budget.seed, budget.round, budget.client, Purpose.DROPOUT))
        for step, micro_batches in enumerate(batches(dataset, budget, steps)):
            for group in optimizer.param_groups:
                group["lr"] = budget.learning_rate * factor(step)
            counted = sum(labelled(rows) for rows in micro_batches)
            value, seen = 0.0, 0
            for rows in micro_batches:
                batch = collate(rows, device, padding)
                loss = summed_loss(model, batch)[0] / counted
                loss.backward()
                value += float(loss.detach())
                seen += sum(len(row["input_ids"]) for row in rows)
                slots += batch["input_ids"].numel()
            if budget.tail_penalty:
                penalty = tail_penalty(model, budget)
                penalty.backward()
                value += float(penalty.detach())
            for parameter, anchor in zip(parameters, anchors, strict=bool(anchors)):
                if parameter.grad is None:  # its layer took no part in this step
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(parameter.detach() - anchor, alpha=budget.proximal_mu)
            if budget.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, budget.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(value)
            tokens += seen
            if budget.on_step:
                budget.on_step(step + 1, steps, value, seen)
    model.eval()
    return {
        "loss": sum(losses) / len(losses),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "steps": len(losses),
        "tokens": tokens,
        "padding": 1 - tokens / slots,
        "seconds": time.perf_counter() - began,
    }
