"""Puts an export on the hub, or says what would be put there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora.errors import FedloraError, InputError


def check_repo(repo: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        InputError: it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push_to_hub: {repo}: {' '.join(str(error).split())}") from None


def files_to_push(directory: Path) -> list[tuple[str, int]]:
    """Every file below a directory, by its path there, and its bytes."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [(path.relative_to(directory).as_posix(), path.stat().st_size) for path in files]


def push(directory: Path, repo: str, private: bool, api: Any = None) -> str:
    """Upload a directory in one commit; the repository is made where there is none.

    Args:
        directory: an export.
        repo: `NAME` or `OWNER/NAME`.
        private: a repository that is made is private; one that is there stays as it is.
        api: of huggingface_hub; None: with the user's own token.

    Returns:
        Where it lies.

    Raises:
        FedloraError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = api or HfApi(library_name="fedlora")
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        full_name = getattr(url, "repo_id", repo)
        api.upload_folder(
            repo_id=full_name, folder_path=directory, commit_message="Upload by fedlora export"
        )
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise FedloraError(
            f"--push_to_hub: {repo}: {why}; {directory} is written and can be uploaded by "
            f"`hf upload {repo} {directory}`"
        ) from None
    return str(url)
