"""The pool's words and bounds; its processes are tested in tests/system/test_workers.py."""

from __future__ import annotations

import pytest

from fedlora.config.config import Config
from fedlora.engines.workers import MOST_ATTEMPTS, _ending


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
    assert _ending(exitcode) == words


def test_clients_are_tried_more_than_once_and_not_for_ever() -> None:
    assert 2 <= MOST_ATTEMPTS <= 5


def test_a_run_in_one_process_has_no_pool() -> None:
    assert (Config().engine, Config().num_workers) == ("local", "auto")
