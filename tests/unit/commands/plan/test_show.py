"""How long things take, in words."""

from __future__ import annotations

import pytest

from fedlora.commands.plan.show import duration


@pytest.mark.parametrize(("seconds", "shown"), [(2.55, "2.5 s"), (90, "1.5 min"), (7200, "2.0 h")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
