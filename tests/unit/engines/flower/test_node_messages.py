"""What a strategy sends to a node, and what it takes of a reply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora.engines.flower.node_messages import (
    content_for,
    read_update,
    round_config,
    weighted_means,
)
from fedlora.engines.flower.peft_records import lora_record
from fedlora.federation.exchange import Agreement
from fedlora.federation.messages import Broadcast
from fedlora.lowrank import Adapter, LowRank, to_dense
from fedlora.methods import METHODS
from fedlora.methods.values import RoundNumbers, Training

RULE = METHODS["fedit"]
AGREEMENT = Agreement(RULE, RULE.options(), {"q": (5, 6)})
SENT = Broadcast(3, 1, 2, {}, {}, {}, {}, 0, RoundNumbers({"q": 2}, (2,)))


def adapter(rank: int = 2) -> Adapter:
    return {"q": LowRank(torch.ones(rank, 6), torch.full((5, rank), 2.0))}


def reply_of(content: RecordDict | None = None, error: Error | None = None) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    asked = Message(RecordDict(), 7, MessageType.TRAIN)
    if error is not None:
        return Message(error, reply_to=asked)
    assert content is not None
    return Message(content, reply_to=asked)


def content_of(arrays: ArrayRecord, **metrics: Any) -> RecordDict:
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})


def test_a_message_holds_what_is_trained_what_is_frozen_and_the_round() -> None:
    config = round_config(Training(trains=("A", "B"), keeps="B"), 2)
    content = content_for(0.5, adapter(2), adapter(3), {}, config)
    shapes = {
        kind: {array.numpy().shape for array in record.values()}
        for kind, record in content.array_records.items()
    }
    assert shapes == {"arrays": {(2, 6), (5, 2)}, "frozen": {(3, 6), (5, 3)}}
    told = content.config_records["config"]
    assert (told["trained-factors"], told["sent-factors"]) == ("B", "")


def test_an_update_is_read_with_its_scale_folded() -> None:
    content = content_of(lora_record(adapter(), 0.5, {}), **{"num-examples": 9, "train_loss": 0.5})
    update, metrics = read_update(reply_of(content), SENT, 0.5, AGREEMENT)
    assert (update.client, update.round, update.num_examples) == (1, 3, 9)
    torch.testing.assert_close(to_dense(update.adapter["q"]), to_dense(adapter()["q"]))
    assert metrics["train_loss"] == 0.5


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (reply_of(error=Error(8)), "process has ended"),
        (reply_of(RecordDict()), "needs an ArrayRecord arrays"),
        (reply_of(content_of(lora_record(adapter(), 1.0, {}))), "num-examples"),
        (reply_of(content_of(ArrayRecord(), **{"num-examples": 3})), "no adapter like the one"),
    ],
)
def test_what_is_no_update_is_told(reply: Message, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_update(reply, SENT, 1.0, AGREEMENT)


def test_means_are_of_numbers_that_all_report() -> None:
    metrics = {
        0: MetricRecord({"num-examples": 1, "loss": 1.0, "own": 3.0}),
        1: MetricRecord({"num-examples": 3, "loss": 2.0, "list": [1.0]}),
    }
    assert dict(weighted_means(metrics, {0: 1.0, 1: 3.0})) == {"loss": 1.75}
