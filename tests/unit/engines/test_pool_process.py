"""How a worker process has ended, in words; real ones are in tests/system/test_workers.py."""

from __future__ import annotations

import pytest

from fedlora.engines.pool_process import ending


@pytest.mark.parametrize(
    ("exitcode", "words"),
    [
        (-9, "was killed by signal 9 (memory ran out?)"),
        (-11, "was killed by signal 11"),
        (3, "has ended with exit code 3"),
        (None, "has ended with exit code None"),
    ],
)
def test_how_a_process_has_ended(exitcode: int | None, words: str) -> None:
    assert ending(exitcode) == words
