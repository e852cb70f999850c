"""What a participant of a federation over Flower reads."""

from __future__ import annotations

from pathlib import Path

from fedlora.commands.deploy.flower.readme import server_readme, site_readme
from support.flower_federation import federation


def test_the_server_is_told_what_listens_where(tmp_path: Path) -> None:
    text = server_readme(federation(tmp_path, "fed.example.org"), "0.1.0", "1.42.0")
    assert "| `127.0.0.1:8003` |" in text
    assert "Control API of Flower's open build has no authentication" in text
    assert "fedlora-server.service" in text


def test_a_site_is_told_whom_it_trusts(tmp_path: Path) -> None:
    text = site_readme("alpha", federation(tmp_path, "fed.example.org"), "0.1.0", "1.42.0")
    assert "fed.example.org:8002 (TLS)" in text
    assert "sends the program that a SuperNode runs" in text
    assert "0.1.0 with flwr 1.42.0" in text
