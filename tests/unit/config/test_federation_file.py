"""The file of a federation: its participants, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlora.commands.deploy.example import EXAMPLE
from fedlora.config.federation_file import FederationFile, read_federation
from fedlora.errors import InputError

WELL: dict[str, Any] = {
    "name": "clinics",
    "server": {"host": "localhost"},
    "sites": {"alpha": {"bounds": {"lora_r": 16}, "train_file": "rows.jsonl"}, "beta-2": None},
    "admins": {"ada@example.org": "lead", "bob@example.org": {"role": "member"}},
}


def federation(directory: Path, **changed: Any) -> FederationFile:
    path = directory / "federation.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**WELL, **changed}.items() if v != "gone"}))
    return read_federation(path)


def test_participants_are_read(tmp_path: Path) -> None:
    read = federation(tmp_path)
    assert list(read.sites) == ["alpha", "beta-2"]
    assert read.sites["alpha"].bounds.lora_r == 16
    assert read.sites["alpha"].settings == {"train_file": "rows.jsonl"}
    assert read.sites["beta-2"].organization == "beta_2"
    assert {name: admin.role for name, admin in read.admins.items()} == {
        "ada@example.org": "lead",
        "bob@example.org": "member",
    }


def test_the_example_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(EXAMPLE)
    assert list(read_federation(path).sites) == ["alpha", "beta", "gamma"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "gone"}, "federation.yaml: name: is missing"),
        ({"name": "two words"}, "name: 'two words': expected letters"),
        ({"server": {"host": "a b"}}, "server: host: 'a b': expected the name"),
        ({"server": {"host": "h", "port": 0}}, "server: port: 0 must be at least 1"),
        ({"server": {"host": "h", "port": 8003}}, "port and admin_port are the same"),
        ({"server": {"host": "h", "prot": 1}}, "server: prot: unknown key; did you mean port"),
        ({"sites": {}}, "sites: there is none"),
        ({"sites": ["a"]}, "sites: .*expected a table"),
        ({"sites": {"a": {}, "A": {}}}, "sites: a: the name is taken"),
        ({"sites": {"server": {}}}, "sites: server: the name is taken"),
        ({"sites": {"a/b": {}}}, "sites: a/b: 'a/b': expected letters"),
        ({"sites": {"a": {"lora_r": 3}}}, "sites: a: lora_r: is the server's to set; limit it"),
        ({"sites": {"a": {"train_fil": "x"}}}, "train_fil: unknown key; did you mean train_file"),
        ({"sites": {"a": {"rank": 3, "max_rank": 3}}}, "rank and max_rank exclude"),
        ({"sites": {"a": {"bounds": {"lora_r": 0}}}}, "sites: a: bounds: lora_r: 0 must be"),
        ({"sites": {"a": {"organization": "a b"}}}, "sites: a: organization: 'a b'"),
        ({"admins": {"ada": "lead"}}, "admins: ada: 'ada': expected an e-mail address"),
        ({"admins": {"a@b.c": "boss"}}, "role: 'boss': expected project_admin or lead or member"),
        ({"admins": {"a@b.c": "member"}}, "admins: none of them may start a run"),
        ({"certificate_days": 0}, "certificate_days: 0 must be at least 1"),
        ({"engine": "nvflare"}, "engine: unknown key"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        federation(tmp_path, **changed)
