"""What a deployment has made."""

from __future__ import annotations

from pathlib import Path

from fedlora.commands.deploy.deployed import Deployed, Folder


def test_it_names_its_folders_in_their_order() -> None:
    folders = (Folder("server", "server", Path("x/server"), True),)
    assert [folder.participant for folder in Deployed(folders).folders] == ["server"]
    assert Deployed(folders).notes == ()
