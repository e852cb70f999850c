"""What TensorBoard's files hold after a run."""

from __future__ import annotations

from fedlora.config.config import TRACKERS
from fedlora.runs.tracker_backends import BACKENDS
from support.trackers import apart  # noqa: F401


def test_every_tracker_that_a_key_names_has_its_library() -> None:
    assert set(BACKENDS) == set(TRACKERS)
