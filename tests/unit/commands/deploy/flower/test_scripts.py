"""Scripts and settings that start a participant."""

from __future__ import annotations

import pytest

from fedlora.commands.deploy.flower.scripts import filled_in

VALUES = {"FEDERATION": "clinics", "HOST": "fed.example.org", "PORT": 8002, "LOOPBACK": 8003}


def test_values_take_their_places() -> None:
    text = filled_in("start-site", {**VALUES, "SITE": "alpha"})
    assert "--superlink fed.example.org:8002 --root-certificates ca.crt" in text
    assert 'name=\\"alpha\\"' in text


def test_a_place_without_a_value_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="start-site has a place"):
        filled_in("start-site", VALUES)


def test_the_superlink_listens_on_the_loopback_alone() -> None:
    text = filled_in("start-server", VALUES)
    assert "flower-superlink --host 127.0.0.1 --port 8003" in text
    assert "--enable-supernode-auth" in text
    assert "--isolation process" in text


def test_flower_asks_nothing_of_the_outside() -> None:
    assert "FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1" in filled_in("flower.sh")
