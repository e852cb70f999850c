"""A participant as a service: a systemd unit, and a container file."""

from __future__ import annotations

import configparser

from fedlora.commands.deploy.service import container_file, unit, unit_name, versions


def test_the_versions_of_libraries_are_pinned_without_their_builds() -> None:
    pins = versions(("torch", "transformers", "peft", "no-such-library"))
    assert list(pins) == ["torch", "transformers", "peft"]
    assert not [version for version in pins.values() if "+" in version]
    text = container_file("Alpha", "a site", "1.2.3", "3.11", {"torch": "2.6"}, (80, 81))
    assert "FROM docker.io/library/python:3.11-slim" in text
    assert "ARG FEDLORA=fedlora==1.2.3" in text
    assert '"torch==2.6"\nWORKDIR' in text
    assert "-p 80:80 -p 81:81 fedlora-alpha" in text
    copied = [line for line in text.splitlines() if line.startswith(("COPY", "ADD"))]
    assert copied == ["COPY Containerfile *.whl /wheels/"], "no key gets into the image"


def test_a_unit_starts_the_folder_s_command_and_may_write_there_alone() -> None:
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.read_string(unit("alpha", "the site alpha"))
    service = parsed["Service"]
    assert service["ExecStart"] == "@FOLDER@/start"
    assert (service["ProtectHome"], service["Environment"]) == (
        "read-only",
        "HF_HOME=@FOLDER@/hub",
    )
    assert (service["ProtectSystem"], service["ReadWritePaths"]) == ("strict", "@FOLDER@")
    assert f"system/{unit_name('alpha')}" in unit("alpha", "x")
