"""The peer of benchmarks/round.py: PEFT and transformers' Trainer, one client after another.

As FLoRA's published script does it: every client gets a deep copy of the global model, an adapter
of its rank and a fresh Trainer; the server stacks the adapters and merges the stack. The flwr
simulation trains its clients with the same function. Nothing here needs more than torch,
transformers and peft (and `fedlora.seeds`, for the same starts and batches).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from round_models import drawn, rows_of
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

Factors = dict[str, tuple[Tensor, Tensor]]
"""Target module -> `A (r, n)`, `B (m, r)`."""
Rows = list[dict[str, list[int]]]
SCALE = 2.0
"""alpha / r, as `lora_alpha: 2r` says."""


class Order(torch.utils.data.Sampler[int]):
    """fedlora's order of rows, one epoch each time it is asked, so that batches are the same."""

    def __init__(self, spec: Mapping[str, Any], client: int, round: int, number: int) -> None:
        self.number = number
        self.rows = drawn(dict(spec), client, round)

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[int]:
        return (next(self.rows) for _ in range(self.number))


class Ordered(Trainer):
    """Trainer with that order; keeps the loss of every step, unread until the end."""

    def __init__(self, order: Order, **options: Any) -> None:
        super().__init__(**options)
        self.order = order
        self.losses: list[Tensor] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss = super().training_step(*arguments, **options)
        self.losses.append(loss)
        return loss


def quiet() -> None:
    """No progress bars and no advice: standard output holds one line of JSON."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(spec: Mapping[str, Any]) -> tuple[Any, Any]:
    """The base on its device, and the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    return model.to(device()), AutoTokenizer.from_pretrained(spec["model"])


def start(spec: Mapping[str, Any], client: int, round: int) -> dict[str, Tensor]:
    """The A a client starts a round with, as fedlora draws it; its B is zero."""
    from fedlora.seeds import Purpose, fresh_factors

    shapes = {name: tuple(shape) for name, shape in spec["shapes"].items()}
    fresh = fresh_factors(spec["seed"], round, client, Purpose.CLIENT_INIT, shapes)
    return {name: fresh(name, spec["ranks"][client]) for name in shapes}


def train_client(
    base: Any,
    tokenizer: Any,
    spec: Mapping[str, Any],
    client: int,
    round: int,
    a_start: Mapping[str, Tensor],
    order: Order,
    rows: Rows,
) -> tuple[Factors, list[float]]:
    """One client's turn.

    Returns:
        Its adapter on the CPU, the scale not folded in, and the loss of every step.
    """
    rank = spec["ranks"][client]
    model = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(
            r=rank,
            lora_alpha=SCALE * rank,
            target_modules=list(spec["shapes"]),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
    )
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in spec["shapes"]}
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data.copy_(a_start[name])
    trainer = Ordered(
        order,
        model=model,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(
            tokenizer, padding="longest", label_pad_token_id=-100, return_tensors="pt"
        ),
        args=TrainingArguments(
            output_dir=str(Path(spec["scratch"]) / "trainer"),
            per_device_train_batch_size=spec["batch"],
            max_steps=spec["steps"],
            learning_rate=spec["learning_rate"],
            lr_scheduler_type="constant",
            # A base in bfloat16 is trained under autocast, without which PEFT's float32 adapters
            # would be multiplied in float32.
            bf16=spec["dtype"] == "bfloat16",
            use_cpu=device().type == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
    )
    trainer.train()
    adapter = {
        name: (
            layer.lora_A["default"].weight.detach().float().cpu(),
            layer.lora_B["default"].weight.detach().float().cpu(),
        )
        for name, layer in layers.items()
    }
    return adapter, [float(loss) for loss in trainer.losses]


def stack(adapters: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """All adapters as one: `A` stacked, `B` side by side with weight and scale folded in."""
    return {
        name: (
            torch.cat([x[name][0] for x in adapters]),
            torch.cat([p * SCALE * x[name][1] for p, x in zip(weights, adapters, strict=True)], 1),
        )
        for name in adapters[0]
    }


@torch.no_grad()
def merge(base: Any, stacked: Factors) -> None:
    """Add a stack to the base weights, in place."""
    for name, (a, b) in stacked.items():
        weight = base.get_submodule(name).weight
        weight += (b.to(weight.device) @ a.to(weight.device)).to(weight.dtype)


def shares(sizes: Sequence[int]) -> list[float]:
    """The clients' weights by their numbers of rows."""
    return [size / sum(sizes) for size in sizes]


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The whole federation.

    Returns:
        rounds (seconds, train, aggregate, losses: of every client the last step's), loaded:
        when (of `time.perf_counter`) the base and the rows were there.
    """
    quiet()
    base, tokenizer = load(spec)
    clients = range(len(spec["ranks"]))
    rows = [rows_of(dict(spec), client) for client in clients]
    weights = shares([len(part) for part in rows])
    loaded = time.perf_counter()
    rounds = []
    for number in range(1, spec["rounds"] + 1):
        # PEFT draws its own start; replacing it is the comparison's wish and not timed.
        starts = [start(spec, client, number) for client in clients]
        orders = [Order(spec, client, number, len(rows[client])) for client in clients]
        began = time.perf_counter()
        adapters, losses = [], []
        for client in clients:
            adapter, found = train_client(
                base,
                tokenizer,
                spec,
                client,
                number,
                starts[client],
                orders[client],
                rows[client],
            )
            adapters.append(adapter)
            losses.append(found[-1])
        trained = time.perf_counter()
        merge(base, stack(adapters, weights))
        if device().type == "cuda":
            torch.cuda.synchronize()
        ended = time.perf_counter()
        rounds.append(
            {
                "seconds": ended - began,
                "train": trained - began,
                "aggregate": ended - trained,
                "evaluate": 0.0,
                "losses": losses,
            }
        )
    return {"rounds": rounds, "loaded": loaded}
