"""The names of local training in a study."""

from __future__ import annotations

import pytest

from fedlora.client.trainer import train
from fedlora.commands.study.adalora import train_adalora
from fedlora.commands.study.trainers import trainer_of
from fedlora.errors import InputError


def test_names_and_what_they_stand_for() -> None:
    assert trainer_of(None) is train
    assert trainer_of("adalora") is train_adalora


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"^trainer: 'mine' is none of adalora$"):
        trainer_of("mine")
