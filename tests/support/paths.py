"""Where the repository and the material beside it lie."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


MATERIAL = REPOSITORY.parent / "shared" / "material"
