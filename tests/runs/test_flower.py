"""Whole runs over Flower's apps: a grid in this process, ClientApps, and sites behind sockets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from flwr.app import Message

from support.conformance import (
    Keys,
    check_goes_on,
    check_same_bytes,
    for_rule,
    in_memory,
    rules,
    three_clients,
)
from support.courses import tensor_files
from support.flower_sites import OverFlower

pytestmark = pytest.mark.usefixtures("kept_bases")


@pytest.fixture
def keys(small_run: Keys) -> Keys:
    return three_clients(small_run)


@pytest.mark.parametrize("method", rules("fedsa"))
def test_a_run_over_flower_gives_the_bytes_of_one_in_a_process(
    keys: Keys, tmp_path: Path, method: str
) -> None:
    check_same_bytes(OverFlower(), for_rule(keys, method), tmp_path)


def test_what_a_client_keeps_stays_at_its_site(keys: Keys, tmp_path: Path) -> None:
    keys = for_rule(keys, "fedsa")
    quiet = in_memory(keys, tmp_path / "memory")
    result = OverFlower()(keys, tmp_path / "flower")
    state = "round-3/state/server.safetensors"
    assert tensor_files(quiet.output_dir)[state] == tensor_files(result.output_dir)[state]


@pytest.mark.parametrize(("method", "stops"), [("exact", (2, 13)), ("ffa", (21,))])
def test_a_server_app_that_is_killed_goes_on_when_it_is_submitted_again(
    keys: Keys, tmp_path: Path, method: str, stops: Sequence[int]
) -> None:
    carrier = OverFlower()
    keys = {**for_rule(keys, method), "num_rounds": 3}
    check_goes_on(carrier, carrier.resume, keys, tmp_path, stops)


@pytest.mark.parametrize("code", [3, 5, 8])
def test_a_message_that_flower_loses_is_sent_again(keys: Keys, tmp_path: Path, code: int) -> None:
    """The ClientApp's process ends (8), the SuperNode is gone (5), the message is (3)."""
    messages = itertools.count()

    def errors(message: Message) -> int | None:
        asked = message.metadata.message_type == "train"
        return code if asked and next(messages) == 7 else None  # after three joins and agreements

    keys = {**keys, "num_rounds": 2}
    result = OverFlower(errors)(keys, tmp_path / "flower")
    quiet = in_memory(keys, tmp_path / "memory")
    assert tensor_files(quiet.output_dir) == tensor_files(result.output_dir)
    clients = [c for line in result.metrics if line["event"] == "round" for c in line["clients"]]
    assert {client["outcome"] for client in clients} == {"counted"}
