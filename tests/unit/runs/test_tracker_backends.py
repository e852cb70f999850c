"""Which libraries trackers write with."""

from __future__ import annotations

from fedlora.config.keys import TRACKERS
from fedlora.runs.tracker_backends import BACKENDS


def test_every_tracker_that_a_key_names_has_its_library() -> None:
    assert set(BACKENDS) == set(TRACKERS)
