"""Trains a client by AdaLoRA, which divides its rank among layers by their importance.

AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512) trains `dW = P diag(e) Q` with an orthogonality
penalty on P and Q, and sets the least important e to zero. PEFT's own implementation trains here,
on a copy of the client's model; the adapter that comes out is `B = P diag(e)`, `A = Q`, which
stacks like any other. Ranks differ from layer to layer, which averaging cannot combine and
stacking can.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedlora.client.local_training import LocalTraining, batches, schedule
from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.lowrank import to_dense
from fedlora.model.batches import collate, count_labelled
from fedlora.model.lora_layer import AdapterLayer, ClientTerm

KEPT = 0.5
"""Share of a client's rank, on average over its layers, that is left at the end."""
LEAST = 4
"""Steps: a quarter of them is trained at the final ranks."""


def train_adalora(
    model: Any, dataset: Sequence[Tokens], training: LocalTraining
) -> Mapping[str, Any]:
    """Train a client's adapter by AdaLoRA: `(model, dataset, training) -> metrics`.

    The adapter begins at the client's full rank and ends at half of it on average: its rank
    budget falls, cubically, from a tenth of the steps to three quarters of them.

    Returns:
        loss (mean over the steps), steps, tokens (of all steps, without padding, as `train` counts
        them) and mean_rank, what is left of the rank.

    Raises:
        InputError: the rule's clients go on from an adapter, where AdaLoRA starts afresh; or there
            are fewer than four steps.
    """
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, AdapterLayer)
    }
    layers = {name: layer for name, layer in layers.items() if layer.A is not None}
    if any(layer.B is not None and bool(layer.B.detach().any()) for layer in layers.values()):
        raise InputError(
            "trainer: adalora starts every round afresh; use it with method flora or florist"
        )
    adapters = {id(p) for layer in layers.values() for p in layer.parameters()}
    if any(p.requires_grad and id(p) not in adapters for p in model.parameters()):
        raise InputError(
            "trainer: adalora trains adapters alone, and this model has parameters that are "
            "trained whole (a classifier's head, lora_modules_to_save)"
        )
    steps = training.steps(len(dataset))
    if steps < LEAST:
        raise InputError(
            f"trainer: adalora divides the rank while it trains; {steps} steps a round are too "
            f"few, take {LEAST} or more"
        )
    tuned = _adalora(model, layers, steps, training)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
    )
    factor, losses, seen = schedule(training, steps), list[float](), 0
    device = next(iter(parameters)).device
    tuned.train()
    for step, micro in enumerate(batches(dataset, training, steps)):
        counted = sum(count_labelled(part) for part in micro)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * factor(step)
        loss = 0.0
        for part in micro:
            if not (share := count_labelled(part) / max(counted, 1)):
                continue  # the model's own loss is a mean over no token
            # PEFT adds the orthogonality penalty in its tuner (`base_model`); calling the outer
            # model would leave it out.
            part_loss = tuned.base_model(**collate(part, device)).loss * share
            part_loss.backward()
            loss += float(part_loss.detach())
        if training.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        tuned.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss)
        tokens = sum(len(row["input_ids"]) for part in micro for row in part)
        seen += tokens
        if training.on_step is not None:
            training.on_step(step + 1, steps, loss, tokens)
    rank = _write_back(tuned, layers)
    return {
        "loss": sum(losses) / len(losses),
        "steps": steps,
        "tokens": seen,
        "mean_rank": rank,
    }


def _adalora(
    model: Any, layers: Mapping[str, AdapterLayer], steps: int, training: LocalTraining
) -> Any:
    """A copy of the client's model with PEFT's AdaLoRA in the place of its adapters."""
    from peft import AdaLoraConfig, get_peft_model

    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, AdapterLayer):
            parent, _, end = name.rpartition(".")
            setattr(plain.get_submodule(parent), end, _linear(module))
    first = next(iter(layers.values()))
    assert first.A is not None
    rank = first.A.shape[0]
    term = first.clients[0]
    assert isinstance(term, ClientTerm)
    torch.manual_seed(training.seed * 1_000_003 + training.round * 1_009 + training.client)
    return get_peft_model(
        plain,
        AdaLoraConfig(
            target_modules=list(layers),
            init_r=rank,
            target_r=max(1, round(KEPT * rank)),
            tinit=steps // 10,
            tfinal=max(1, steps // 4),
            deltaT=1,
            total_step=steps,
            # PEFT divides by the rank; the scale is then the client's own.
            lora_alpha=round(term.scale * rank),
            lora_dropout=term.dropout,
        ),
    )


def _linear(layer: AdapterLayer) -> nn.Linear:
    """The layer's frozen side, base and all that was merged, as one linear layer."""
    weight = layer.merged if layer.merged is not None else layer.weight
    weight = weight.detach().T if layer.conv1d else weight.detach()
    if layer.branch is not None:
        weight = weight + to_dense(layer.branch).to(weight)
    term = layer.clients[0] if len(layer.clients) else None
    private = term.private if isinstance(term, ClientTerm) else None
    if private is not None:
        weight = weight + to_dense(private).to(weight)
    out = nn.Linear(
        weight.shape[1], weight.shape[0], bias=layer.bias is not None, dtype=weight.dtype
    )
    out.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if layer.bias is not None:
        out.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return out.to(weight.device)


@torch.no_grad()
def _write_back(tuned: Any, layers: Mapping[str, AdapterLayer]) -> float:
    """Put `B = P diag(e)`, `A = Q` into the client's layers; returns the mean rank."""
    ranks = []
    for name, layer in layers.items():
        peft_layer = tuned.base_model.model.get_submodule(name)
        e = peft_layer.lora_E["default"].flatten()  # (r,)
        scale = peft_layer.scaling["default"] / (float(peft_layer.ranknum["default"]) + 1e-5)
        term = layer.clients[0]
        assert isinstance(term, ClientTerm)
        assert layer.A is not None
        assert layer.B is not None
        layer.A.copy_(peft_layer.lora_A["default"])
        layer.B.copy_(peft_layer.lora_B["default"] * e * (scale / term.scale))
        ranks.append(int((e != 0).sum()))
    return sum(ranks) / len(ranks)
