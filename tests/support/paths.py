"""Where the repository and the material beside it lie."""

from __future__ import annotations

from pathlib import Path

from support.tiers import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_deselected,
    pytest_sessionfinish,
    pytest_testnodedown,
    pytest_unconfigure,
)

REPOSITORY = Path(__file__).resolve().parents[2]


MATERIAL = REPOSITORY.parent / "shared" / "material"
