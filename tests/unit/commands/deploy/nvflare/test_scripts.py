"""How a participant starts: a script, a systemd unit, a container file."""

from __future__ import annotations

import configparser

from fedlora.commands.deploy.nvflare import scripts


def test_the_versions_of_libraries_are_pinned_without_their_builds() -> None:
    pins = scripts.versions()
    assert {"torch", "transformers", "peft"} <= set(pins)
    assert not [version for version in pins.values() if "+" in version]
    text = scripts.container_file("Alpha", "a site", "1.2.3", "3.11", {"torch": "2.6"}, (80, 81))
    assert "FROM docker.io/library/python:3.11-slim" in text
    assert "ARG FEDLORA=fedlora==1.2.3" in text
    assert '"torch==2.6"\nWORKDIR' in text
    assert "-p 80:80 -p 81:81 fedlora-alpha" in text


def test_a_unit_starts_the_folder_s_command_and_may_write_there_alone() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.read_string(scripts.unit("alpha", "the site alpha"))
    service = unit["Service"]
    assert service["ExecStart"] == "@FOLDER@/start"
    assert (service["ProtectSystem"], service["ReadWritePaths"]) == ("strict", "@FOLDER@")
    assert f"system/{scripts.unit_name('alpha')}" in scripts.unit("alpha", "x")


def test_scripts_say_which_python_they_lack() -> None:
    for script in (scripts.SITE, scripts.SERVER):
        assert script.startswith("#!/usr/bin/env bash\n")
        assert "set FEDLORA_PYTHON" in script
