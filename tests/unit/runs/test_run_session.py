"""What the course of a run asks of its ingredients."""

from __future__ import annotations

from dataclasses import fields

import pytest

from fedlora.runs.run_session import RunSession
from fedlora.runs.server_session import ServerSession
from fedlora.runs.session import Session


@pytest.mark.parametrize("kind", [Session, ServerSession])
def test_a_session_has_every_part(kind: type) -> None:
    own = {*vars(kind), *(field.name for field in fields(kind))}
    assert {name for name in vars(RunSession) if not name.startswith("_")} <= own
