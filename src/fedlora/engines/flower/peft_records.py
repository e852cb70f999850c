"""Translates between LoRA updates and Flower's ArrayRecords, whose keys are those of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedlora.adapters.keys import PREFIX, read_keys
from fedlora.adapters.saved_adapter import as_factors, write_adapter
from fedlora.errors import InputError
from fedlora.lowrank import Adapter, Deltas, LowRank, fold, unfold
from fedlora.model.targets import Targets

ARRAYS, FROZEN, CONFIG, METRICS, ADAPTER = "arrays", "frozen", "config", "metrics", "adapter"
"""Keys of the records in a message; `arrays`, `config` and `metrics` are Flower's own."""


@dataclass(frozen=True)
class LoraState:
    """What a LoRA state dict holds.

    Args:
        a: target module -> the factor `A (r, n)`.
        b: target module -> the factor `B (m, r)`.
        whole: parameters that are trained whole, by their names in the model without PEFT.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    def updates(self, scale: float) -> dict[str, LowRank]:
        """The updates `dW = s B A` of modules whose factors are both there."""
        return {name: fold(a, self.b[name], scale) for name, a in self.a.items() if name in self.b}


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """The arrays of a record as tensors, copied, so that they can be written to."""
    return {key: torch.from_numpy(array.numpy().copy()) for key, array in record.items()}


def record_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a record. Half precision is carried as float32, as numpy knows no bfloat16."""
    arrays = {}
    for key, value in tensors.items():
        value = value.detach().cpu()
        if value.dtype in (torch.bfloat16, torch.float16):
            value = value.float()
        arrays[key] = Array(value.contiguous().numpy())
    return ArrayRecord(arrays)


def read_lora(record: ArrayRecord) -> LoraState:
    """Read a state dict of `get_peft_model_state_dict`, or a raw one of one adapter.

    Args:
        record: its arrays.

    Raises:
        InputError: it holds something else than the factors of plain LoRA on linear layers, and
            parameters trained whole.
    """
    tensors = tensors_of(record)
    state = LoraState({}, {}, {})
    for text, key in read_keys(tensors).items():
        if key.kind == "lora" and key.part in ("A", "B"):
            factors: Any = state.a if key.part == "A" else state.b
            factors[key.name] = tensors[text]
        elif key.kind in ("whole", "plain"):
            state.whole[key.name] = tensors[text]  # type: ignore[index]
        else:
            raise InputError(
                f"{text}: is no factor of plain LoRA on a linear layer; send "
                "get_peft_model_state_dict(model) of a LoraConfig without variants"
            )
    for name in state.a.keys() & state.b.keys():
        if state.a[name].shape[0] != state.b[name].shape[1]:
            raise InputError(f"{name}: lora_A and lora_B are of different ranks")
    return state


def lora_record(updates: Adapter, scale: float, whole: Mapping[str, Tensor]) -> ArrayRecord:
    """Updates as the state dict of an adapter that trains under scale s.

    Args:
        updates: target module -> its update.
        scale: the scale s of the adapter.
        whole: parameters that are trained whole.
    """
    tensors = {}
    for name, update in updates.items():
        a, b = unfold(update, scale)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    tensors.update({f"{PREFIX}{name}": value for name, value in whole.items()})
    return record_of(tensors)


def global_record(deltas: Deltas, whole: Mapping[str, Tensor]) -> ArrayRecord:
    """A global model as the state dict of one adapter of scale 1 (`alpha = r`).

    Its modules may be of different ranks; one whose matrix takes fewer numbers than its factors is
    written as that matrix times an identity.
    """
    return lora_record({name: as_factors(x) for name, x in deltas.items()}, 1.0, whole)


def save(
    arrays: ArrayRecord, directory: str | Path, model_name: str, task_type: str = "CAUSAL_LM"
) -> None:
    """Write a strategy's result as a PEFT directory, which `PeftModel.from_pretrained` loads.

    Args:
        arrays: `result.arrays` of a `FedLora` strategy.
        directory: that does not exist yet, or whose files of these names are overwritten.
        model_name: of the base, hub name or directory.
        task_type: PEFT's name of the task.

    Raises:
        InputError: the arrays are no adapter, or the directory cannot be written.
    """
    state = read_lora(arrays)
    updates = state.updates(1.0)
    if not updates:
        raise InputError(
            f"{directory}: there is no adapter to write; was a reply aggregated in any round?"
        )
    targets = Targets(
        shapes={name: update.shape for name, update in updates.items()},
        names=sorted(updates),
        fan_in_fan_out=False,
        model_name=model_name,
        task_type=task_type,
        modules_to_save=tuple(dict.fromkeys(name.rpartition(".")[0] for name in state.whole)),
    )
    try:
        write_adapter(Path(directory), updates, targets, state.whole)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from None
