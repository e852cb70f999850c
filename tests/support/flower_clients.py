"""ClientApps of a strategy's users, small enough to compute by hand."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedlora.adapters.keys import PREFIX
from fedlora.engines.flower.peft_records import read_lora, record_of, tensors_of

SHAPES = {"one": (12, 10), "two": (9, 11)}
"""Target modules of the federation, `(m, n)`."""


def initial_arrays(rank: int = 2) -> ArrayRecord:
    """A fresh adapter: A random, B zero."""
    tensors = {}
    for name, (m, n) in SHAPES.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.ones(rank, n)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(m, rank)
    return record_of(tensors)


def product_of(record: ArrayRecord, scale: float = 1.0) -> dict[str, Tensor]:
    """What an adapter adds to each module, `(m, n)`."""
    return {name: x.B @ x.A for name, x in read_lora(record).updates(scale).items()}


def moving_clients(seen: list[Message]) -> ClientApp:
    """Clients that move what they train by random numbers of their own.

    The node's configuration gives `rank`, `scale` and `rows`; what they are sent is kept in `seen`.
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        config = context.node_config
        told: dict[str, Any] = {
            "rank": config["rank"],
            "scale": config["scale"],
            "num-examples": config["rows"],
            "name": str(config["partition-id"]),
        }
        return Message(RecordDict({"adapter": ConfigRecord(told)}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(message)
        config = message.content.config_records["config"]
        seed = int(config["server-round"]) * 10 + int(context.node_config["partition-id"])
        random = torch.Generator().manual_seed(seed)
        tensors = tensors_of(message.content.array_records["arrays"])
        for key, value in tensors.items():
            if ("A" if ".lora_A" in key else "B") in config["trained-factors"]:
                value += 0.1 * torch.randn(value.shape, generator=random)
        metrics = {"num-examples": int(context.node_config["rows"]), "train_loss": float(seed)}
        content = RecordDict({"arrays": record_of(tensors), "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        seen.append(message)
        arrays, frozen = (message.content.array_records[key] for key in ("arrays", "frozen"))
        own = product_of(arrays, float(context.node_config["scale"]))
        beside = product_of(frozen)
        norm = sum(float((own[k] + beside.get(k, torch.zeros(()))).norm()) for k in own)
        metrics = {"num-examples": int(context.node_config["rows"]), "norm": norm}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return app
