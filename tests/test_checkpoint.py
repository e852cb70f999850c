"""A run's directory: made in one step, locked, verified, pruned, never overwritten."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.adapters.saved_adapter import load_adapter
from fedlora.errors import CheckpointError, FedloraError, InputError
from fedlora.lowrank import Delta, Dense, LowRank, prefix, to_dense
from fedlora.methods.values import Encoded, ServerState
from fedlora.model.targets import Targets
from fedlora.runs.directory import RunDirectory, check_free, load_round
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.safe_writing import verify, write_errors_are_explained
from fedlora.runs.state_file import settled, state_from_tensors, state_to_tensors

TARGETS = Targets(
    {"b.up": (6, 4), "a.down": (4, 6)}, ["up", "down"], False, "tiny", modules_to_save=("head",)
)


def low(rank: int = 2) -> LowRank:
    return LowRank(torch.randn(rank, 4), torch.randn(6, rank))


def a_state(number: int = 1) -> ServerState:
    """A state with something in every place, some of it views and some of it shared."""
    torch.manual_seed(number)
    shared, whole = low(), low(4)
    return ServerState(
        round=number,
        adapter={"b.up": prefix(whole, 2), "a.down": Dense(torch.randn(6, 4).T)},
        base_delta={"b.up": shared},
        dense={"head.weight": torch.randn(3, 5)},
        last_merge={"b.up": shared},
        last_seen={0: 1, 3: number},
        momentum=Encoded({"b.up/A": whole.A[:2]}, {"b.up": shared}),
    )


def same(x: Delta, y: Delta) -> bool:
    return type(x) is type(y) and torch.equal(to_dense(x), to_dense(y))


def assert_same(one: ServerState, other: ServerState) -> None:
    assert (one.round, dict(one.last_seen)) == (other.round, dict(other.last_seen))
    left, right = state_to_tensors(one), state_to_tensors(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "out", "seed: 1\n")


def save(run: RunDirectory, number: int) -> Path:
    state = a_state(number)
    line = {"event": "round", "round": number}
    return run.save_round({"b.up": low()}, TARGETS, state, line, {"best": number})


# --- the state ---


def test_state_survives_its_tensors() -> None:
    state = a_state()
    back = state_from_tensors(state_to_tensors(state), state.round, state.last_seen, state.ranks)
    assert_same(state, back)
    for group in ("adapter", "base_delta", "last_merge"):
        one, other = getattr(state, group), getattr(back, group)
        assert one.keys() == other.keys()
        assert all(same(one[k], other[k]) for k in one)
    assert torch.equal(back.momentum.factors["b.up/A"], state.momentum.factors["b.up/A"])
    assert same(back.momentum.products["b.up"], state.momentum.products["b.up"])
    assert torch.equal(back.dense["head.weight"], state.dense["head.weight"])


def test_no_two_tensors_of_a_state_share_memory() -> None:
    """safetensors refuses those that do; after FLoRA's round, merge and momentum are the same."""
    tensors = state_to_tensors(a_state())
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(tensors)


def test_an_empty_state_survives_its_tensors() -> None:
    state = ServerState(round=0, adapter={}, base_delta={})
    assert_same(state, state_from_tensors(state_to_tensors(state), 0, {}, {}))


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


# --- made in one step ---


def test_directory_and_configuration_appear_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, rename = list[tuple[bool, str]](), Path.rename

    def watch(self: Path, target: Path) -> Path:
        seen.append((Path(target).exists(), (self / "config.yaml").read_text()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    RunDirectory.create(tmp_path / "deep" / "er" / "out", "seed: 1\n")
    assert seen == [(False, "seed: 1\n")]
    assert (tmp_path / "deep" / "er" / "out" / "config.yaml").read_text() == "seed: 1\n"
    assert [p.name for p in (tmp_path / "deep" / "er").iterdir()] == ["out"]


def test_an_empty_directory_is_used_and_kept(tmp_path: Path) -> None:
    """It may be a mount point, a link or somebody's working directory."""
    empty = tmp_path / "empty"
    empty.mkdir()
    before = empty.stat().st_ino
    RunDirectory.create(empty, "seed: 1\n")
    assert empty.stat().st_ino == before
    assert sorted(p.name for p in empty.iterdir()) == [".lock", "config.yaml"]


def test_a_link_to_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    RunDirectory.create(tmp_path / "link", "seed: 1\n")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.yaml").exists()


def test_the_working_directory_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunDirectory.create(".", "seed: 1\n")
    assert Path("config.yaml").read_text() == "seed: 1\n"


def test_what_a_killed_start_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "config.yaml").write_text("se")
    RunDirectory.create(tmp_path / "out", "seed: 1\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".config.yaml.partial").write_text("se")
    RunDirectory.create(empty, "seed: 1\n")
    for name in ("out", "empty"):
        assert (tmp_path / name / "config.yaml").read_text() == "seed: 1\n"
    assert sorted(p.name for p in tmp_path.rglob("*partial")) == []


def another_run(path: Path) -> None:
    RunDirectory.create(path, "seed: 9\n").close()


def complete_run(path: Path) -> None:
    run = RunDirectory.create(path, "seed: 9\n")
    run.save_final(lambda partial: None)
    run.close()


def other_files(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


OCCUPIED: list[tuple[Callable[[Path], Any], str]] = [
    (another_run, r"holds another run; .*go on with it: fedlora run --resume"),
    (complete_run, r"holds a complete run; choose another --output_dir$"),
    (other_files, r"is not empty; choose another"),
    (lambda path: path.write_text("a file"), r"is a file"),
]


@pytest.mark.parametrize(("occupy", "message"), OCCUPIED, ids=["run", "complete", "files", "file"])
def test_an_occupied_directory_is_refused_and_untouched(
    tmp_path: Path, occupy: Callable[[Path], Any], message: str
) -> None:
    path = tmp_path / "out"
    occupy(path)
    before = snapshot(tmp_path)
    for refuse in (check_free, lambda p: RunDirectory.create(p, "seed: 1\n")):
        with pytest.raises(InputError, match=message) as raised:
            refuse(path)
        assert str(path) in str(raised.value)
    assert snapshot(tmp_path) == before


def test_a_directory_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"output_dir: .*file/out: cannot be made"):
        RunDirectory.create(tmp_path / "file" / "out", "")


# --- opened and locked ---


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        with pytest.raises(InputError, match=f"{name}: nothing to resume; there is no config.yaml"):
            RunDirectory.open(tmp_path / name)
    complete_run(tmp_path / "done")
    with pytest.raises(InputError, match=r"done: nothing to resume; the run is complete"):
        RunDirectory.open(tmp_path / "done")
    assert not (tmp_path / "empty" / ".lock").exists()


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


# --- rounds ---


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


def test_equal_rounds_are_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "other"):
        run = RunDirectory.create(tmp_path / name, "")
        torch.manual_seed(0)
        contents.append(snapshot(run.save_round({"b.up": low()}, TARGETS, a_state(), {}, {})))
    assert contents[0] == contents[1]


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

    monkeypatch.setattr("fedlora.runs.directory.save_tensors", full)
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


# --- metrics ---


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


# --- no space ---


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_write_errors_are_explained(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(FedloraError, match=f"{tmp_path}: no space left .* --resume {tmp_path}$"),
        write_errors_are_explained(tmp_path),
    ):
        raise OSError(number, "full")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), write_errors_are_explained(tmp_path):
        raise BrokenPipeError(errno.EPIPE, "pipe")
