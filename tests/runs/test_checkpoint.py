"""A run's directory: made in one step, locked, verified, pruned, never overwritten."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.adapters.saved_adapter import load_adapter
from fedlora.errors import CheckpointError, InputError
from fedlora.lowrank import Dense, LowRank
from fedlora.runs.directory import RunDirectory, load_round
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.safe_writing import verify
from fedlora.runs.state_file import settled, state_to_tensors
from support.checkpoint import TARGETS, a_state, assert_same, low, snapshot


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "out", "seed: 1\n")


def save(run: RunDirectory, number: int) -> Path:
    state = a_state(number)
    line = {"event": "round", "round": number}
    return run.save_round({"b.up": low()}, TARGETS, state, line, {"best": number})


def test_a_settled_state_is_laid_out_as_a_loaded_one(run: RunDirectory) -> None:
    """Otherwise a resumed run takes another course in its last bits."""
    loaded, kept = load_round(save(run, 1)).state, settled(a_state(1))
    assert_same(loaded, kept)
    assert list(loaded.adapter) == list(kept.adapter)
    one, other = state_to_tensors(loaded), state_to_tensors(kept)
    assert list(one) == list(other)
    assert not all(  # the state as it came out of a round is laid out differently
        x.is_contiguous()
        for x in (a_state(1).adapter["a.down"].W, a_state(1).adapter["b.up"].B)  # type: ignore[union-attr]
    )
    for state in (loaded, kept):
        up, down = state.adapter["b.up"], state.adapter["a.down"]
        assert isinstance(up, LowRank)
        assert isinstance(down, Dense)
        for tensor in (up.A, up.B, down.W):
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % 64 == 0


def test_one_writer_at_a_time(run: RunDirectory) -> None:
    with pytest.raises(InputError, match="another process is writing to this run"):
        RunDirectory.open(run.path)
    run.close()
    RunDirectory.open(run.path).close()


def test_a_lock_that_cannot_be_written_is_explained(run: RunDirectory) -> None:
    run.close()
    (run.path / ".lock").unlink()
    (run.path / ".lock").mkdir()
    with pytest.raises(InputError, match="cannot be written to: Is a directory"):
        RunDirectory.open(run.path)


def test_a_round_is_a_peft_directory_and_a_state(run: RunDirectory) -> None:
    path = save(run, 1)
    assert path == run.path / "round-1"
    saved = load_round(path)
    assert_same(saved.state, a_state(1))
    assert saved.line == {"event": "round", "round": 1}
    assert saved.extra == {"best": 1}
    assert load_adapter(path).deltas.keys() == set(TARGETS.shapes)
    assert torch.equal(load_adapter(path).dense["head.weight"], saved.state.dense["head.weight"])
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(manifest) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "state/server.safetensors",
        "state/state.json",
    ]


@pytest.mark.parametrize("broken", ["", "{", "[1", "\udcff"])
def test_a_broken_manifest_is_damage(run: RunDirectory, broken: str) -> None:
    path = save(run, 1)
    (path / "manifest.json").write_text(broken, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"round-1: damaged \(manifest.json is missing"):
        verify(path)


def test_every_flipped_byte_is_noticed(run: RunDirectory) -> None:
    path = save(run, 1)
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        good = file.read_bytes()
        for at in range(0, len(good), max(1, len(good) // 7)):
            file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
            with pytest.raises(CheckpointError, match="damaged"):
                verify(path)
        file.write_bytes(good)
    verify(path)


def test_load_latest_takes_the_newest_that_is_whole(run: RunDirectory) -> None:
    assert run.load_latest() == (None, [])
    for number in (1, 2, 10):
        save(run, number)
    saved, problems = run.load_latest()
    assert saved
    assert (saved.state.round, problems) == (10, [])
    (run.path / "round-10" / "manifest.json").unlink()
    saved, problems = run.load_latest()
    assert saved
    assert saved.state.round == 2
    [problem] = problems
    assert "round-10: damaged" in problem


def test_a_damaged_round_is_put_aside_when_it_is_written_again(run: RunDirectory) -> None:
    save(run, 1)
    (run.path / "round-1" / "state" / "state.json").write_text("{}")
    save(run, 1)
    verify(run.path / "round-1")
    assert (run.path / "round-1.damaged" / "state" / "state.json").read_text() == "{}"
    assert run.rounds() == [1]


def test_no_half_written_round_has_a_name(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fedlora.runs.saved_state.save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        save(run, 1)
    assert run.rounds() == []
    # What half fills the disk would keep it full.
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "config.yaml"]


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, None, [1, 2, 3, 4, 5]),
        (9, None, [1, 2, 3, 4, 5]),
        (3, None, [3, 4, 5]),
        (3, 1, [1, 3, 4, 5]),
        (2, 4, [4, 5]),
        (1, None, [4, 5]),  # never fewer than two: the newest may turn out to be damaged
    ],
)
def test_prune(run: RunDirectory, limit: int | None, keep: int | None, left: list[int]) -> None:
    for number in range(1, 6):
        save(run, number)
    run.prune(limit, keep)
    assert run.rounds() == left
    for number in left:
        verify(run.path / f"round-{number}")
    assert [p.name for p in run.path.iterdir() if p.name.endswith(".removed")] == []


def test_the_newest_adapter_is_kept(run: RunDirectory) -> None:
    """Where adapters are saved in some rounds only, one is there after the first of them."""
    for number in range(1, 8):
        delta = {"b.up": low()} if number % 4 == 0 else None
        run.save_round(delta, TARGETS, a_state(number), {}, {})
        run.prune(2, None)
    assert run.rounds() == [4, 6, 7]
    assert not (run.path / "round-7" / "adapter_model.safetensors").exists()
    assert_same(load_round(run.path / "round-7").state, a_state(7))


def test_prune_where_a_killed_one_left_something(run: RunDirectory) -> None:
    for number in range(1, 4):
        save(run, number)
    (run.path / ".round-1.removed").mkdir()
    (run.path / ".round-1.removed" / "file").write_text("x")
    run.prune(2, None)
    assert run.rounds() == [2, 3]


def test_sweep_removes_leftovers_alone(run: RunDirectory) -> None:
    save(run, 1)
    before = snapshot(run.path)
    for name in (".round-2.partial", ".final.partial", ".round-0.removed"):
        (run.path / name).mkdir()
        (run.path / name / "file").write_text("x")
    run.sweep()
    assert snapshot(run.path) == before
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "config.yaml", "round-1"]


def test_metrics_are_appended(run: RunDirectory) -> None:
    run.append({"event": "start", "round": 0})
    first = (run.path / "metrics.jsonl").read_bytes()
    run.append({"event": "round", "round": 1})
    assert (run.path / "metrics.jsonl").read_bytes().startswith(first)
    assert [line["round"] for line in read_metrics(run.path)] == [0, 1]


@pytest.mark.parametrize(
    ("content", "mended"),
    [
        ("", ""),
        ('{"ev', ""),
        ('{"a": 1}\n', '{"a": 1}\n'),
        ('{"a": 1}\n{"b', '{"a": 1}\n'),
        ('{"a": 1}\n{"b": 2}', '{"a": 1}\n'),  # whole, but for all we know not
    ],
)
def test_mend_metrics(run: RunDirectory, content: str, mended: str) -> None:
    (run.path / "metrics.jsonl").write_text(content)
    run.mend_metrics()
    assert (run.path / "metrics.jsonl").read_text() == mended


def test_mend_metrics_makes_no_file(run: RunDirectory) -> None:
    run.mend_metrics()
    assert not (run.path / "metrics.jsonl").exists()


def test_read_metrics_tells_every_round_once(run: RunDirectory) -> None:
    lines: list[dict[str, Any]] = [
        {"event": "start", "round": 0},
        {"event": "round", "round": 1, "x": "old"},
        {"event": "round", "round": 2, "x": "old"},
        {"event": "round", "round": 3, "x": "old"},
        {"event": "end", "round": 3},
        {"event": "resume", "round": 1},  # 2 and 3 were damaged
        {"event": "round", "round": 1, "x": "new"},
        {"event": "round", "round": 2, "x": "new"},
    ]
    for line in lines:
        run.append(line)
    with (run.path / "metrics.jsonl").open("a") as out:
        out.write('{"event": "rou')
    found = [(line["event"], line["round"], line.get("x")) for line in read_metrics(run.path)]
    assert found == [("start", 0, None), ("round", 1, "new"), ("round", 2, "new")]
