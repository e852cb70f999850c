"""Helps a ClientApp that trains a PEFT model of its own: says what it is, loads, replies.

app = ClientApp()

@app.query()
def query(message, context):
    return Message(describe(lora_config, num_examples, name), reply_to=message)

@app.train()
def train(message, context):
    load(model, message, context)       # where this round starts, for this node's rank
    metrics = ...                       # train the model: transformers, TRL, your own loop
    return reply(model, message, context, num_examples, {"train_loss": ...})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from fedlora.engines.flower.peft_records import (
    ADAPTER,
    ARRAYS,
    CONFIG,
    FROZEN,
    METRICS,
    read_lora,
    record_of,
    tensors_of,
)
from fedlora.errors import InputError
from fedlora.lowrank import scaling

FROZEN_ADAPTER = "frozen"
"""The name of the PEFT adapter that holds what of the global model is not trained."""

_OWN = "fedlora-own-factors"  # in the node's state, which stays at it


def describe(config: LoraConfig, num_examples: int, name: str | int = "") -> RecordDict:
    """What a node answers to the strategy's query: the adapter that it trains.

    Args:
        config: of the adapter; its `r`, `lora_alpha` and `use_rslora` count.
        num_examples: rows that the node trains on, its weight.
        name: by which the strategy numbers its nodes, such as the partition's id. With it a run
            gives the same result however the nodes connect.

    Raises:
        InputError: the adapter has ranks or scales of single modules.
    """
    if config.rank_pattern or config.alpha_pattern:
        raise InputError("rank_pattern, alpha_pattern: a node trains one rank and one scale")
    scale = scaling(config.lora_alpha, config.r, config.use_rslora)
    told = {"rank": config.r, "scale": scale, "num-examples": num_examples, "name": str(name)}
    return RecordDict({ADAPTER: ConfigRecord(told)})


def load(model: PeftModel, message: Message, context: Context | None = None) -> None:
    """Bring a PEFT model to where a TRAIN or EVALUATE message says.

    What is trained goes into the model's adapter `default`. What of the global model is frozen in
    this round goes into a second adapter, `frozen`, which is active beside it: the base's own
    weights are not touched, be they quantised. A factor that the rule does not train in this round
    takes no gradient.

    Args:
        model: of `get_peft_model`, with the adapter that `describe` told.
        message: from the strategy `FedLora`.
        context: of the ClientApp; needed by rules under which nodes keep factors (fedsa).
    """
    content = message.content
    tensors = tensors_of(content.array_records[ARRAYS])
    if context is not None and _OWN in context.state.array_records:
        tensors.update(tensors_of(context.state.array_records[_OWN]))
    set_peft_model_state_dict(model, tensors)
    frozen = content.array_records.get(FROZEN, ArrayRecord())
    _load_frozen(model, tensors_of(frozen))
    trained = str(content.config_records[CONFIG].get("trained-factors", "AB"))
    for name, parameter in model.named_parameters():
        if f".{FROZEN_ADAPTER}." in name:
            parameter.requires_grad_(False)
        elif ".lora_A." in name or ".lora_B." in name:
            parameter.requires_grad_(("A" if ".lora_A." in name else "B") in trained)


def _load_frozen(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Put what is frozen into an adapter of its own, in the place of an earlier one."""
    tuner = model.base_model
    if FROZEN_ADAPTER in model.peft_config:
        model.delete_adapter(FROZEN_ADAPTER)
    if not tensors:
        tuner.set_adapter("default")
        return
    ranks = {name: len(a) for name, a in read_lora(record_of(tensors)).a.items()}
    most = max(ranks.values())
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != most}
    own = model.peft_config["default"]
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(ranks),
        fan_in_fan_out=own.fan_in_fan_out,
        task_type=own.task_type,
    )
    model.add_adapter(FROZEN_ADAPTER, config)
    set_peft_model_state_dict(model, tensors, adapter_name=FROZEN_ADAPTER)
    tuner.set_adapter(["default", FROZEN_ADAPTER])


def reply(
    model: PeftModel,
    message: Message,
    context: Context | None,
    num_examples: int,
    metrics: Mapping[str, Any] | None = None,
) -> Message:
    """What a node answers when it has trained or evaluated.

    Args:
        model: as trained.
        message: what it answers.
        context: as `load` takes it; factors that the node keeps are written to its state.
        num_examples: rows that it has trained or evaluated on.
        metrics: numbers, averaged by the strategy with `num_examples` as weights.
    """
    told = {key: float(value) for key, value in (metrics or {}).items()}
    content = RecordDict({METRICS: MetricRecord({**told, "num-examples": num_examples})})
    config = message.content.config_records[CONFIG]
    if "sent-factors" not in config:  # an evaluation
        return Message(content, reply_to=message)
    sent, trained = str(config["sent-factors"]), str(config["trained-factors"])
    tensors = get_peft_model_state_dict(model, adapter_name="default")
    kept = {key: x for key, x in tensors.items() if _factor(key) in set(trained) - set(sent)}
    if kept and context is None:
        raise InputError("this rule has nodes keep factors of theirs; hand reply the context")
    if kept:
        context.state[_OWN] = record_of(kept)  # type: ignore[union-attr]
    travels = {key: x for key, x in tensors.items() if _factor(key) in {*sent, ""}}
    content[ARRAYS] = record_of(travels)
    return Message(content, reply_to=message)


def _factor(key: str) -> str:
    """Which factor a PEFT key names, "A" or "B"; "" for a parameter trained whole."""
    return "A" if ".lora_A" in key else "B" if ".lora_B" in key else ""
