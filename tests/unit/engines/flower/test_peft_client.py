"""What a ClientApp of one's own does with a PEFT model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fedlora.engines.flower.peft_client import describe, load, reply
from fedlora.engines.flower.peft_records import global_record, lora_record, read_lora
from fedlora.errors import InputError
from fedlora.lowrank import Adapter, LowRank, to_dense


class Small(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        out: torch.Tensor = self.v(self.q(x))
        return out


@pytest.fixture(autouse=True)
def _task() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    torch.manual_seed(0)


def config_of(**own: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], **own})


def model_of() -> PeftModel:
    return get_peft_model(Small(), config_of())


def adapter(rank: int) -> Adapter:
    return {
        "q": LowRank(torch.randn(rank, 6), torch.randn(6, rank)),
        "v": LowRank(torch.randn(rank, 6), torch.randn(4, rank)),
    }


def message_of(trained: Adapter, frozen: Adapter, **config: Any) -> Message:
    told = {"trained-factors": "AB", "sent-factors": "AB", **config}
    content = RecordDict(
        {
            "arrays": lora_record(trained, 2.0, {}),
            "frozen": global_record(frozen, {}),
            "config": ConfigRecord(told),
        }
    )
    message = Message(content, 7, MessageType.TRAIN)
    message.metadata.__dict__["_message_id"] = "asked"
    return message


def expected(model: PeftModel, x: torch.Tensor, *adapters: Adapter) -> torch.Tensor:
    """What the base gives with these updates added to its weights."""
    for name in ("q", "v"):
        layer = getattr(model.base_model.model, name).get_base_layer()
        weight = layer.weight + sum(to_dense(adapter[name]) for adapter in adapters if adapter)
        x = nn.functional.linear(x, weight, layer.bias)
    return x


def test_a_node_tells_what_it_trains() -> None:
    told = describe(config_of(), 12, 3).config_records["adapter"]
    assert dict(told) == {"rank": 2, "scale": 2.0, "num-examples": 12, "name": "3"}
    with pytest.raises(InputError, match="rank_pattern"):
        describe(config_of(rank_pattern={"q": 4}), 12)


def test_the_model_is_the_base_with_what_is_trained_and_what_is_frozen() -> None:
    model, x = model_of(), torch.randn(3, 6)
    model.eval()
    for rank in (3, 5):  # the second takes the first one's place
        trained, frozen = adapter(2), adapter(rank)
        load(model, message_of(trained, frozen))
        torch.testing.assert_close(model(x), expected(model, x, trained, frozen))
    trained = adapter(2)
    load(model, message_of(trained, {}))
    torch.testing.assert_close(model(x), expected(model, x, trained))


def test_what_the_rule_does_not_train_takes_no_gradient() -> None:
    model = model_of()
    load(model, message_of(adapter(2), adapter(3), **{"trained-factors": "B"}))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.{m}.lora_B.default.weight" for m in ("q", "v")}


def test_a_reply_brings_the_adapter_that_was_trained() -> None:
    model, trained = model_of(), adapter(2)
    message = message_of(trained, adapter(3))
    load(model, message)
    answer = reply(model, message, None, 12, {"train_loss": torch.tensor(0.5)}).content
    back = read_lora(answer.array_records["arrays"]).updates(2.0)
    for name, x in trained.items():
        torch.testing.assert_close(to_dense(back[name]), to_dense(x))
    assert dict(answer.metric_records["metrics"]) == {"num-examples": 12, "train_loss": 0.5}


def test_a_factor_that_a_node_keeps_stays_in_its_state() -> None:
    model, trained = model_of(), adapter(2)
    context = Context(1, 7, {}, RecordDict(), {})
    message = message_of(trained, {}, **{"sent-factors": "A"})
    load(model, message, context)
    with pytest.raises(InputError, match="hand reply the context"):
        reply(model, message, None, 12)
    arrays = reply(model, message, context, 12).content.array_records["arrays"]
    assert all(".lora_A" in key for key in arrays)
    fresh = model_of()
    other = {name: LowRank(x.A, torch.zeros_like(x.B)) for name, x in trained.items()}
    load(fresh, message_of(other, {}, **{"sent-factors": "A"}), context)
    kept = fresh.base_model.model.q.lora_B["default"].weight
    torch.testing.assert_close(kept, trained["q"].B / 2.0)


def test_an_evaluation_is_answered_with_numbers_alone() -> None:
    model = model_of()
    message = message_of(adapter(2), {})
    del message.content.config_records["config"]["sent-factors"]
    load(model, message)
    answer = reply(model, message, None, 5, {"eval_loss": 1.0}).content
    assert not answer.array_records
    assert dict(answer.metric_records["metrics"]) == {"num-examples": 5, "eval_loss": 1.0}
