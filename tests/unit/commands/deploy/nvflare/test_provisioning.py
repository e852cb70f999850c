"""The provisioning project of a federation, and what nvflare makes of it."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from fedlora.commands.deploy.nvflare.provisioning import discard_kits, project, provision
from fedlora.errors import InputError
from support.federations import LEAD, federation_of


def test_every_participant_stands_in_the_project(tmp_path: Path) -> None:
    made = project(federation_of(tmp_path, certificate_days=90))
    assert made["participants"] == [
        {
            "name": "localhost",
            "type": "server",
            "org": "server",
            "fed_learn_port": 18002,
            "admin_port": 18003,
        },
        {"name": "alpha", "type": "client", "org": "alpha"},
        {"name": LEAD, "type": "admin", "org": "server", "role": "lead"},
    ]
    assert {"root_valid_days": 90} in [builder.get("args") for builder in made["builders"]]


def test_it_provisions_kits_and_again_the_same_keys(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    federation, kept = federation_of(tmp_path), tmp_path / "kept"
    kits = provision(federation, kept)
    assert set(kits) == {"server", "alpha", LEAD}
    key = (kits["alpha"] / "startup" / "client.key").read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    startup = kits["alpha"] / "startup"
    context.load_cert_chain(startup / "client.crt", startup / "client.key")
    discard_kits(kits)
    assert not kits["alpha"].exists()
    again = provision(federation, kept)
    assert (again["alpha"] / "startup" / "client.key").read_bytes() == key
    assert kept.stat().st_mode & 0o077 == 0
    assert capfd.readouterr() == ("", "")


def test_a_name_that_nvflare_refuses_is_told(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, admins={"ada@localhost": "lead"})
    with pytest.raises(InputError, match=r"deploy nvflare: .*ada@localhost"):
        provision(federation, tmp_path / "kept")
