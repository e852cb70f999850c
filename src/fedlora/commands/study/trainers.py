"""Names the kinds of local training, other than fedlora's own, that a study may use."""

from __future__ import annotations

from fedlora.client.local_training import TrainFunction
from fedlora.client.trainer import train
from fedlora.errors import InputError


def trainer_of(name: str | None) -> TrainFunction:
    """The local training of this name; None: fedlora's."""
    if name is None:
        return train
    if name == "adalora":
        from fedlora.commands.study.adalora import train_adalora

        return train_adalora
    raise InputError(f"trainer: {name!r} is none of adalora")
