"""Folders of a federation that Flower carries: what is in them, and what a second call adds."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedlora.commands.deploy.flower.folders import deploy
from fedlora.config.site import read_site
from fedlora.errors import InputError
from support.flower_federation import federation

SECRET = ("server/server.key", "server/superexec.secret", "alpha/node.key", ".federation/ca.key")


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_everyone_has_a_folder_and_the_one_command(tmp_path: Path) -> None:
    deployed = deploy(federation(tmp_path), tmp_path / "out")
    made = [(folder.participant, folder.kind, folder.new) for folder in deployed.folders]
    assert made == [("server", "server", True), ("alpha", "site", True), ("beta", "site", True)]
    for folder in deployed.folders:
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        assert (folder.path / "start").stat().st_mode & stat.S_IXUSR
        assert "./start" in (folder.path / "README.md").read_text()
    assert any("no admins" in note and "ada@example.org" in note for note in deployed.notes)


def test_secrets_are_their_owners_alone(tmp_path: Path) -> None:
    deploy(federation(tmp_path), tmp_path / "out")
    for name in SECRET:
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == 0o600, name
    handed_out = contents(tmp_path / "out" / "server") | contents(tmp_path / "out" / "alpha")
    ca = (tmp_path / "out" / ".federation" / "ca.key").read_bytes()
    assert not any(ca in content for content in handed_out.values())


def test_the_server_has_the_keys_that_sites_show(tmp_path: Path) -> None:
    deploy(federation(tmp_path), tmp_path / "out")
    for name in ("alpha", "beta"):
        shown = (tmp_path / "out" / "server" / "sites" / f"{name}.pub").read_bytes()
        private = (tmp_path / "out" / name / "node.key").read_bytes()
        assert load_ssh_public_key(shown) == load_ssh_private_key(private, None).public_key()


def test_the_sites_file_is_one_that_a_worker_reads(tmp_path: Path) -> None:
    deploy(federation(tmp_path), tmp_path / "out")
    site = read_site(tmp_path / "out" / "alpha" / "site.yaml")
    assert (site.name, site.bounds.lora_r) == ("alpha", 16)
    assert site.settings["model_name_or_path"] == "embedded"
    assert Path(site.socket) == tmp_path / "out" / "alpha" / "worker.sock"


def test_a_site_that_joins_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    deploy(federation(tmp_path), tmp_path / "out")
    before = contents(tmp_path / "out")
    deployed = deploy(federation(tmp_path, sites=("beta", "gamma")), tmp_path / "out")
    after = contents(tmp_path / "out")
    record = ".federation/record.json"
    assert {k: v for k, v in after.items() if k in before and k != record} == {
        k: v for k, v in before.items() if k != record
    }
    new = {name.partition("/")[0] for name in after.keys() - before.keys()}
    assert new == {"gamma", "server"}
    assert after["server/sites/gamma.pub"] == after["gamma/node.pub"]
    assert after["gamma/ca.crt"] == after["server/ca.crt"]
    assert any("sites/gamma.pub" in note and "--register" in note for note in deployed.notes)


def test_sites_of_one_machine_take_different_ports_of_the_loopback(tmp_path: Path) -> None:
    deploy(federation(tmp_path), tmp_path / "out")
    ports = []
    for name in ("alpha", "beta"):
        text = (tmp_path / "out" / name / "start").read_text()
        ports.append(text.partition("FEDLORA_PORT:-")[2].partition("}")[0])
    assert ports == ["9094", "9095"]


def test_a_site_that_left_is_named_with_what_shuts_it_out(tmp_path: Path) -> None:
    deploy(federation(tmp_path), tmp_path / "out")
    deployed = deploy(federation(tmp_path, sites=()), tmp_path / "out")
    assert any("beta is no longer" in note and "unregister" in note for note in deployed.notes)


def test_another_server_is_another_federation(tmp_path: Path) -> None:
    deploy(federation(tmp_path), tmp_path / "out")
    with pytest.raises(InputError, match=r"server: is now host fed\.example\.org"):
        deploy(federation(tmp_path, "fed.example.org"), tmp_path / "out")
