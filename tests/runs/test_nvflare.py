"""NVIDIA FLARE conforms: what its jobs carry gives the bytes of a run in one process.

FLARE's own task management and serialisation, our controller and executors; no network.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.methods import METHODS
from fedlora.runs.events import Event, ignore
from fedlora.runs.results import Result
from support.conformance import (
    Callbacks,
    Keys,
    check_same_bytes,
    for_rule,
    three_clients,
)
from support.flare import Flare, resumed, submitted
from support.sites import sites_of

pytestmark = pytest.mark.usefixtures("kept_bases")


class Jobs:
    """Carries a run by jobs of FLARE to sites in memory, which are remembered."""

    flare: Flare

    def __call__(
        self, keys: Keys, out: Path, events: list[Event] | None = None, callbacks: Callbacks = ()
    ) -> Result:
        directory = out.with_name(f"{out.name}-flare")
        self.flare = Flare(directory, sites_of(keys, directory / "sites"))
        return submitted(keys, out, self.flare, ignore if events is None else events.append)

    def resume(self, out: Path) -> Result:
        return resumed(out, self.flare)


@pytest.fixture
def keys(small_run: Keys) -> Keys:
    return three_clients(small_run)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fedsa"])
def test_every_rule_gives_the_same_bytes(keys: Keys, tmp_path: Path, method: str) -> None:
    check_same_bytes(Jobs(), for_rule(keys, method), tmp_path)
