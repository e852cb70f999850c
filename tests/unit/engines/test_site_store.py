"""What a site keeps of a run is whole or absent, and found again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fedlora.engines.site_store import MOST_RUNS, RunStore, disguised
from fedlora.errors import CheckpointError, FedloraError
from fedlora.federation.exchange import Agreement
from fedlora.federation.held_model import HeldModel
from fedlora.federation.messages import ClientState
from fedlora.lowrank import Dense, LowRank
from fedlora.methods import METHODS

ODD = "../../etc/passwd"


def state(value: float) -> ClientState:
    return ClientState({"q.B": torch.full((3, 2), value)})


def test_a_run_s_id_names_no_directory_elsewhere(tmp_path: Path) -> None:
    store = RunStore.of(tmp_path / "kept", ODD)
    assert store.path.parent == tmp_path / "kept"
    assert oct(store.path.stat().st_mode & 0o777) == "0o700"
    last = RunStore.last(tmp_path / "kept")
    assert last is not None
    assert last.run == ODD


def test_messages_and_answers_are_kept(tmp_path: Path) -> None:
    store = RunStore.of(tmp_path, "run")
    store.keep("join", b"join")
    store.keep_answer((1, 0), b"first")
    store.keep_answer((1, 1), b"second")
    again = RunStore.of(tmp_path, "run")
    assert (again.kept("join"), again.kept("agree")) == (b"join", None)
    assert {turn: path.read_bytes() for turn, path in again.answers().items()} == {
        (1, 1): b"second"
    }
    again.forget("join")
    again.forget_answers()
    assert (store.kept("join"), store.answers()) == (None, {})


def test_the_global_model_is_kept_to_the_bit(tmp_path: Path) -> None:
    """One that is damaged, or of another agreement, is none: the server sends all of it."""
    rule = METHODS["exact"]
    agreement = Agreement(rule, rule.options(), {"layers/0.q": (4, 3), "v": (2, 2)}, 0)
    other = Agreement(rule, rule.options(), agreement.shapes, 1)
    q = LowRank(torch.randn(2, 3), torch.randn(4, 2))
    adapter = {"layers/0.q": q, "v": Dense(torch.randn(2, 2))}
    store = RunStore.of(tmp_path, "run")
    assert store.model(agreement).round is None
    store.keep_model(HeldModel(agreement, 3, adapter, {"layers/0.q": q}))
    kept = RunStore.of(tmp_path, "run").model(agreement)
    assert kept.round == 3
    assert torch.equal(kept.adapter["layers/0.q"].A, q.A)
    assert torch.equal(kept.leading["layers/0.q"].B, q.B)
    assert torch.equal(kept.adapter["v"].W, adapter["v"].W)
    assert store.model(other).round is None
    path = store.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert store.model(agreement).round is None


def test_the_state_that_counts_stays(tmp_path: Path) -> None:
    store = RunStore.of(tmp_path, "run")
    for attempt in range(3):
        store.keep_state((2, attempt), state(attempt))
    store.keep_only((2, 1))
    kept = store.state((2, 1))
    assert kept is not None
    assert torch.equal(kept.factors["q.B"], torch.ones(3, 2))
    assert store.state((2, 0)) is None
    assert store.state((2, 2)) is None


def test_a_damaged_state_is_said(tmp_path: Path) -> None:
    store = RunStore.of(tmp_path, "run")
    store.keep_state((1, 0), state(1))
    path = store.path / "state-1-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="checksum differs"):
        store.state((1, 0))


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore.of(tmp_path, "run")
    store.keep("join", b"old")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedlora.engines.site_store.sync", full)
    with pytest.raises(FedloraError, match="cannot be written to"):
        store.keep("join", b"new")
    assert store.kept("join") == b"old"
    assert not list(store.path.glob(".*"))


def test_runs_of_long_ago_make_room(tmp_path: Path) -> None:
    for number in range(MOST_RUNS + 2):
        store = RunStore.of(tmp_path, f"run-{number}")
        os.utime(store.path, (number, number))
    RunStore.of(tmp_path, "new")
    assert len(list(tmp_path.iterdir())) == MOST_RUNS
    last = RunStore.last(tmp_path)
    assert last is not None
    assert last.run == "new"
    last.remove()
    assert not last.path.exists()


def test_what_is_damaged_is_no_run(tmp_path: Path) -> None:
    assert RunStore.last(tmp_path / "none") is None
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text("{}")
    assert RunStore.last(tmp_path) is None


def test_a_fingerprint_says_nothing_to_who_has_not_the_secret(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    said = disguised(one, "rows")
    assert said == disguised(one, "rows"), "the same rows are known again"
    assert said != disguised(one, "other rows")
    assert said != disguised(other, "rows")
    assert oct((one / "secret").stat().st_mode & 0o777) == "0o600"
    assert RunStore.last(one) is None
