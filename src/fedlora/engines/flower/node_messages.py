"""Writes what a strategy sends to a node, and reads what the node replies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedlora.engines.flower.failures import in_words
from fedlora.engines.flower.peft_records import (
    ARRAYS,
    CONFIG,
    FROZEN,
    METRICS,
    LoraState,
    global_record,
    lora_record,
    read_lora,
)
from fedlora.errors import InputError
from fedlora.federation.exchange import Agreement
from fedlora.federation.messages import Broadcast, ClientUpdate, adapter_of
from fedlora.lowrank import Adapter, Deltas, LowRank
from fedlora.methods.values import Training


def content_for(
    scale: float,
    trained: Adapter,
    frozen: Deltas,
    whole: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> RecordDict:
    """The content of a message to a node.

    Args:
        scale: LoRA's s of the node's adapter.
        trained: what it trains, or starts from.
        frozen: what is added to the base and not trained.
        whole: parameters trained whole.
        config: what it is told beside them.
    """
    frozen = {name: x for name, x in frozen.items() if x.rank}
    return RecordDict(
        {
            ARRAYS: lora_record(trained, scale, whole),
            FROZEN: global_record(frozen, {}),
            CONFIG: ConfigRecord(dict(config)),
        }
    )


def round_config(training: Training, number: int) -> dict[str, Any]:
    """What a rule asks of the local training in a round, as a node is told."""
    return {
        "trained-factors": training.trained(number),
        "sent-factors": training.sent(number),
        "tail-penalty": training.tail_penalty,
        "tail-from": training.tail_from,
    }


def read_update(
    reply: Message, sent: Broadcast, scale: float, agreement: Agreement
) -> tuple[ClientUpdate, MetricRecord]:
    """The update and the metrics in a node's reply.

    Args:
        reply: of the node, or of Flower in its place.
        sent: what the node was sent.
        scale: LoRA's s of the node's adapter.
        agreement: of the federation.

    Raises:
        ValueError: it holds none; why.
    """
    if reply.has_error():
        raise ValueError(in_words(reply.error))
    told = reply.content.metric_records.get(METRICS, MetricRecord())
    arrays = reply.content.array_records.get(ARRAYS)
    rows = told.get("num-examples")
    if arrays is None or not isinstance(rows, int) or rows < 0:
        raise ValueError(
            f"its reply needs an ArrayRecord {ARRAYS} and a MetricRecord {METRICS} with "
            "num-examples"
        )
    sends = agreement.training.sent(sent.round)
    try:
        lora = read_lora(arrays)
        adapter = _received(lora, sends, scale, agreement)
    except (InputError, KeyError, AssertionError, RuntimeError) as error:
        raise ValueError(f"its arrays are no adapter like the one it was sent: {error}") from None
    whole = {
        name: x.to(sent.dense[name].dtype) for name, x in lora.whole.items() if name in sent.dense
    }
    numbers = {key: value for key, value in told.items() if isinstance(value, int | float)}
    return ClientUpdate(sent.client, sent.round, adapter, rows, whole, numbers, sends), told


def _received(
    lora: LoraState, sends: str, scale: float, agreement: Agreement
) -> dict[str, LowRank]:
    """The adapter in a reply, its scale folded; zeros in the place of a factor that is not sent."""
    tensors = {
        **{f"A/{name}": x.float() for name, x in lora.a.items() if "A" in sends},
        **{f"B/{name}": x.float() * scale for name, x in lora.b.items() if "B" in sends},
    }
    return adapter_of(tensors, agreement.shapes)


def weighted_means(
    metrics: Mapping[int, MetricRecord], weights: Mapping[int, float]
) -> MetricRecord:
    """Means of the numbers that all nodes report.

    Args:
        metrics: of each node.
        weights: of each node, not normalised.
    """
    total = sum(weights.values())
    names = set.intersection(*(set(record) for record in metrics.values())) - {"num-examples"}
    means = MetricRecord()
    for name in sorted(names):
        values = {client: record[name] for client, record in metrics.items()}
        if all(isinstance(value, int | float) for value in values.values()):
            means[name] = sum(weights[client] * value for client, value in values.items()) / total
    return means
