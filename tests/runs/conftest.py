"""Gives whole runs in this process the bases that they share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.kept_bases import fresh_bases, kept_bases  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def no_model_cards() -> Iterator[None]:
    """PEFT leaves out its README.md, which nobody reads here and which takes longest to write."""
    from peft import PeftModel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "create_or_update_model_card", lambda model, directory: None)
        yield
