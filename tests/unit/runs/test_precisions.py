"""Which clients get a base of their own, and that clients of one precision share it."""

from __future__ import annotations

from typing import Any

from fedlora.config.config import Config
from fedlora.runs.precisions import bits_held, load_other_bases


def test_one_base_for_each_other_precision() -> None:
    loaded: list[Any] = []

    def load(config: Config) -> Any:
        loaded.append((config.load_in_8bit, config.load_in_4bit))
        return loaded[-1]

    own = {
        0: {"lora_r": 4},
        1: {"load_in_4bit": True},
        2: {"load_in_8bit": True},
        4: {"load_in_4bit": True, "lora_r": 2},
    }
    bases, choices = load_other_bases(Config(client_overrides=own), load)
    assert bases == {1: (False, True), 2: (True, False), 4: (False, True)}
    assert loaded == [(False, True), (True, False)]
    assert choices == [
        "base of client 1, 4: held in 4 bits, in memory beside the run's",
        "base of client 2: held in 8 bits, in memory beside the run's",
    ]


def test_a_client_may_hold_it_as_it_is() -> None:
    config = Config(load_in_8bit=True, client_overrides={3: {"load_in_8bit": False}})
    bases, choices = load_other_bases(config, lambda own: (own.load_in_8bit, own.load_in_4bit))  # type: ignore[arg-type,return-value]
    assert bases == {3: (False, False)}
    assert choices == ["base of client 3: held as it is, in memory beside the run's"]


def test_the_bits_of_single_clients_count() -> None:
    assert bits_held(Config(client_overrides={0: {"lora_r": 4}})) == set()
    own = {1: {"load_in_4bit": True}}
    assert bits_held(Config(client_overrides=own)) == {4}
    assert bits_held(Config(client_overrides=own, load_in_8bit=True)) == {4, 8}
