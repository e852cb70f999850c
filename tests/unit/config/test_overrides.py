"""The settings of a single client over those of its federation."""

from __future__ import annotations

import pytest

from fedlora.config.config import Config
from fedlora.config.overrides import with_overrides_of
from fedlora.errors import InputError

CONFIG = Config(max_steps=5, client_overrides={1: {"max_steps": 7, "lora_r": 4}})


def test_a_clients_settings_are_over_the_others_and_hold_no_table_themselves() -> None:
    own = with_overrides_of(CONFIG, 1)
    assert (own.max_steps, own.lora_r, own.client_overrides) == (7, 4, None)
    assert own.learning_rate == CONFIG.learning_rate
    assert with_overrides_of(CONFIG, 0) is CONFIG


def test_an_impossible_value_is_refused_with_the_client() -> None:
    config = CONFIG.model_copy(update={"client_overrides": {3: {"lora_r": 0}}})
    with pytest.raises(InputError, match="client_overrides: client 3: lora_r"):
        with_overrides_of(config, 3)


def test_a_key_of_the_federation_is_refused_with_those_that_a_client_may_set() -> None:
    config = CONFIG.model_copy(update={"client_overrides": {3: {"num_rounds": 2}}})
    with pytest.raises(InputError, match="client 3: num_rounds is not a client's own to set"):
        with_overrides_of(config, 3)
