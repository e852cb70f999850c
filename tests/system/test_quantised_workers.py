"""Worker processes train on a base in 4 bits as this process does, each client in its precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from support.courses import tensor_files
from support.extras import needs_bitsandbytes
from support.runs import run

pytestmark = needs_bitsandbytes

KEYS = {"dtype": "float32", "use_cpu": True, "cohort_size": 1, "load_in_4bit": True}


@pytest.mark.parametrize("own", [None, {1: {"load_in_4bit": False}, 2: {"load_in_8bit": True}}])
def test_workers_give_the_same_bytes(
    small_run: Mapping[str, Any], own: dict[int, dict[str, bool]] | None
) -> None:
    """A base as it is would be merged once for all workers; not beside other precisions."""
    keys = {**small_run, **KEYS, "client_overrides": own}
    quiet = run(keys, "local")
    pool = run(keys, "workers", engine="workers", num_workers=2)
    one, other = (tensor_files(x.output_dir) for x in (quiet, pool))
    assert sorted(one) == sorted(other)
    assert [name for name in one if one[name] != other[name]] == []
