"""Uploading: what the hub is told, and what would be uploaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.commands.export.hub import check_repo, files_to_push, push
from fedlora.errors import FedloraError, InputError


class Hub:
    """Takes the calls of huggingface_hub's client."""

    def __init__(self, error: str = "") -> None:
        self.error, self.calls = error, list[tuple[str, Any]]()

    def create_repo(self, repo: str, **named: Any) -> Any:
        self.calls.append((repo, named))
        return SimpleNamespace(repo_id=f"me/{repo}")

    def upload_folder(self, **named: Any) -> None:
        if self.error:
            raise RuntimeError(self.error)
        self.calls.append(("upload", named))


def test_a_repository_is_private_and_gets_one_commit(tmp_path: Path) -> None:
    hub = Hub()
    push(tmp_path, "adapter", True, hub)
    (made, uploaded) = hub.calls
    assert made == ("adapter", {"private": True, "exist_ok": True})
    assert uploaded[1]["repo_id"] == "me/adapter"
    assert uploaded[1]["folder_path"] == tmp_path


def test_what_the_hub_refuses_is_said_with_what_is_left(tmp_path: Path) -> None:
    with pytest.raises(FedloraError, match=r"x: 401 no token; .* is written and can be uploaded"):
        push(tmp_path, "x", True, Hub("401\nno token"))


def test_files_are_listed_with_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("four")
    (tmp_path / "a.txt").write_text("")
    assert files_to_push(tmp_path) == [("a.txt", 0), ("b/c.txt", 4)]


@pytest.mark.parametrize("repo", ["a/b/c", "-x", "", "a b"])
def test_names_that_are_none(repo: str) -> None:
    with pytest.raises(InputError, match=r"--push_to_hub: "):
        check_repo(repo)


def test_names_that_are_fine() -> None:
    check_repo("adapter")
    check_repo("me/adapter-1.0")
