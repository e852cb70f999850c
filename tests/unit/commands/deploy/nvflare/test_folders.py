"""The folders of a federation: what is in them, and that a later call adds to them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedlora.commands.deploy.nvflare.folders import deploy
from fedlora.config.site import read_site
from fedlora.engines.nvflare.kit import read_admin_kit
from fedlora.errors import InputError
from support.federations import LEAD, SMALL, federation_of, files_of


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment; tests change a copy of it."""
    directory = tmp_path_factory.mktemp("deployed")
    made = deploy(federation_of(directory), directory / "out")
    assert [(f.participant, f.kind, f.new) for f in made.folders] == [
        ("server", "server", True),
        ("alpha", "site", True),
        (LEAD, "admin", True),
    ]
    return directory / "out"


def test_a_site_s_folder_holds_all_that_it_needs(first: Path) -> None:
    names = set(files_of(first / "alpha"))
    assert {
        "README.md",
        "Containerfile",
        "fedlora-alpha.service",
        "site.yaml",
        "start",
        "kit/local/fedlora.json",
        "kit/local/resources.json",
        "kit/startup/client.key",
    } <= names
    assert (first / "alpha").stat().st_mode & 0o077 == 0
    assert (first / "alpha" / "start").stat().st_mode & 0o100
    site = read_site(first / "alpha" / "site.yaml")
    assert site.bounds.lora_r == 16


def test_an_admin_s_kit_is_that_of_its_user(first: Path) -> None:
    kit = read_admin_kit(first / LEAD / "kit")
    assert (kit.user, kit.server, kit.sites) == (LEAD, "localhost:18003", ("alpha",))


def test_one_more_site_leaves_the_others_as_they_are(first: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(first, output)
    (output / "alpha" / "site.yaml").write_text("name: alpha  # changed by its owner\n")
    before = files_of(output)
    more = federation_of(tmp_path, sites={**SMALL["sites"], "beta": {}})
    made = deploy(more, output)
    assert [f.participant for f in made.folders if f.new] == ["beta"]
    assert any(LEAD in note and "fedlora.json" in note for note in made.notes)
    after = files_of(output)
    changed = {name for name, content in before.items() if after[name] != content}
    assert {name for name in changed if not name.startswith(".federation/")} == {
        f"{LEAD}/kit/local/fedlora.json"
    }
    assert read_admin_kit(output / LEAD / "kit").sites == ("alpha", "beta")
    root = "kit/startup/rootCA.pem"
    assert after[f"beta/{root}"] == after[f"alpha/{root}"]
    fewer = deploy(federation_of(tmp_path), output)
    assert any(note.startswith("beta is no longer") for note in fewer.notes)


def test_what_was_handed_out_does_not_change(first: Path, tmp_path: Path) -> None:
    moved = federation_of(tmp_path, server={"host": "example.org"})
    with pytest.raises(InputError, match="deploy into another directory"):
        deploy(moved, first)


def test_certificates_that_end_before_the_federation_are_told(tmp_path: Path) -> None:
    made = deploy(federation_of(tmp_path, certificate_days=800), tmp_path / "out")
    assert any("360 days" in note for note in made.notes)
