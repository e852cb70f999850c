"""Runs whose messages are compressed: resumed to the same bytes, and what a round's line says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora.methods.values import ServerState
from support.conformance import Keys, check_goes_on, for_rule, in_memory, lines_of, three_clients
from support.courses import tensor_files

pytestmark = pytest.mark.usefixtures("kept_bases")


@pytest.fixture
def keys(small_run: Keys) -> Keys:
    return {**three_clients(small_run), "compression": "int8", "num_rounds": 3}


@pytest.mark.parametrize("method", ["exact", "fedsa"])
def test_a_run_goes_on_with_what_was_lost(keys: Keys, tmp_path: Path, method: str) -> None:
    """Also where a client keeps a factor of its own beside it."""

    def resume(out: Path) -> fedlora.Result:
        return fedlora.run(resume=out)

    keys = {**for_rule(keys, method), "num_rounds": 3}
    check_goes_on(in_memory, resume, keys, tmp_path, stops=(13,))


def test_what_is_not_handed_out_is_kept_by_the_server(keys: Keys, tmp_path: Path) -> None:
    """The modules are so small that S is a matrix, whose rounding loses something."""
    states = list[ServerState]()
    in_memory(keys, tmp_path / "on", callbacks=[lambda result: states.append(result.state)])
    assert all(state.unsent for state in states)
    names = tensor_files(tmp_path / "on")
    assert "round-3/state/clients.safetensors" in names
    off = {**keys, "compression_feedback": False}
    in_memory(off, tmp_path / "off", callbacks=[lambda result: states.append(result.state)])
    assert not states[-1].unsent
    assert "round-3/state/clients.safetensors" not in tensor_files(tmp_path / "off")


def test_a_line_says_what_was_lost_where_something_is(keys: Keys, tmp_path: Path) -> None:
    lines: list[Any] = lines_of(in_memory({**keys, "compression": "bf16"}, tmp_path / "bf16"))
    assert all(0 < line["compression_error_up"] < 0.02 for line in lines)
    assert all(0 <= line["compression_error_down"] < 0.01 for line in lines)
    plain: list[Any] = lines_of(in_memory({**keys, "compression": "none"}, tmp_path / "none"))
    assert not any(key.startswith("compression") for line in plain for key in line)
    for half, whole in zip(lines, plain, strict=True):
        assert 2 * half["bytes_up"] == whole["bytes_up"]
