"""Sets up runs whose clients have settings of their own."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def keys(small_run: dict[str, Any]) -> dict[str, Any]:
    """One rank for all, no generation."""
    return {**small_run, "client_ranks": None, "lora_r": 2, "eval_exact_match": False}
