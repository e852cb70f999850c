"""A run killed at any moment, and resumed, ends with the same bytes as one never interrupted."""

from __future__ import annotations

import itertools
import json
import os
import random
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedlora
import fedlora.methods
from fedlora.client.trainer import train
from fedlora.commands.cli import main
from fedlora.errors import CheckpointError, FedloraError, InputError
from fedlora.runs import evaluation as rating
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.safe_writing import verify
from support.products import in_turn
from support.resume import (
    DRIVER,
    ROUNDS,
    Driver,
    StoppedError,
    begin,
    course,
    driver,  # noqa: F401
    stop_after,
    whole_lines,
    write,
)

pytestmark = pytest.mark.usefixtures("kept_bases")


METHODS = ("exact", "flora")


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def keys(tiny_llama: Path, site_files: Path) -> dict[str, Any]:
    """A run of a third of a second in which rounds are pruned and momentum is kept."""
    return {
        "model_name_or_path": str(tiny_llama),
        "train_file": str(site_files / "site_*.jsonl"),
        "eval_file": str(site_files / "eval.jsonl"),
        "client_ranks": [8, 4, 2, 2],
        "num_rounds": ROUNDS,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lora_dropout": 0.1,
        "clients_per_round": 3,
        "cohort_size": 2,  # in every round two clients in one pass, then one
        "server_momentum": 0.5,
        "eval_exact_match": False,
        "save_total_limit": 2,
        "num_threads": 1,
    }


@pytest.fixture(scope="module")
def whole(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For every method the directory of a run that was never interrupted."""
    out = {}
    for method in METHODS:
        path = tmp_path_factory.mktemp("whole") / method
        fedlora.run(fedlora.Config(**{**keys, "method": method, "output_dir": str(path)}))
        out[method] = path
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def final(path: Path) -> bytes:
    return (path / "final" / WEIGHTS).read_bytes()


def assert_ends_like(path: Path, reference: Path, before: bytes = b"") -> None:
    assert final(path) == final(reference)
    assert course(path) == course(reference)
    expected = ["begin", "start", *["round"] * ROUNDS, "end"]
    assert [line["event"] for line in course(path)] == expected
    assert [line["round"] for line in course(path)] == [0, *range(ROUNDS + 1), ROUNDS]
    content = (path / "metrics.jsonl").read_bytes()
    assert content.startswith(before)
    for line in content.splitlines():  # what was torn is gone, not grown together with the next
        json.loads(line)
    assert [p.name for p in path.iterdir() if p.name.startswith(".") and p.name != ".lock"] == []


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


KILLS = [
    ("before training", 1),
    ("before training", 4),  # of the second cohort of round 2
    ("in a client's steps", 1),
    ("in a client's steps", 6),  # the second step of the first
    ("in a client's steps", 7),
    ("before the first line", 1),
    ("half of the state", 1),
    ("half of the state", 3),
    ("before the manifest", 2),
    ("half of the adapter", 2),
    ("manifest, no name yet", 2),
    ("manifest, no name yet", 3),
    ("no metrics line yet", 1),
    ("no metrics line yet", 3),
    ("half a metrics line", 1),
    ("half a metrics line", 2),
    ("before pruning", 1),
    ("while pruning", 1),
    ("half of final", 1),
    ("before final is named", 1),
]


@pytest.mark.parametrize(("point", "n"), KILLS, ids=[f"{p}-{n}" for p, n in KILLS])
def test_killed_at_a_point(
    driver: Driver,
    keys: dict[str, Any],
    whole: dict[str, Path],
    tmp_path: Path,
    point: str,
    n: int,
) -> None:
    path = begin(driver, tmp_path, {**keys, "method": "exact"}, point=point, n=n)
    assert not (path / "final").exists()
    assert [p for p in path.glob("round-*") if not (p / "manifest.json").is_file()] == []
    before = whole_lines(path)
    fedlora.run(resume=path)
    assert_ends_like(path, whole["exact"], before)


def test_killed_before_the_directory_has_its_name_leaves_nothing_in_the_way(
    driver: Driver, keys: dict[str, Any], whole: dict[str, Path], tmp_path: Path
) -> None:
    path = begin(driver, tmp_path, {**keys, "method": "exact"}, point="before the directory")
    assert not path.exists()
    with pytest.raises(InputError, match="nothing to resume"):
        fedlora.run(resume=path)
    fedlora.run(fedlora.Config(**{**keys, "method": "exact", "output_dir": str(path)}))
    assert_ends_like(path, whole["exact"])
    assert not (tmp_path / ".out.partial").exists()


@pytest.fixture(scope="module")
def calls(driver: Driver, keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many calls the package's own code makes in a run."""
    path = tmp_path_factory.mktemp("calls")
    config = write(path / "config.yaml", {**keys, "output_dir": str(path / "out")})
    assert driver("run", config, calls=-1) == 0
    return int(driver.stdout.split()[-1])


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_a_random_call(
    driver: Driver,
    calls: int,
    keys: dict[str, Any],
    whole: dict[str, Path],
    tmp_path: Path,
    seed: int,
) -> None:
    method = METHODS[seed % 2]
    # Reading the model and the data takes the first tenth or so; a run that is killed there has
    # nothing to resume and is tested above.
    moment = random.Random(seed).randrange(calls // 10, calls * 9 // 10)
    path = begin(driver, tmp_path, {**keys, "method": method}, calls=moment)
    if not path.exists():
        fedlora.run(fedlora.Config(**{**keys, "method": method, "output_dir": str(path)}))
        assert_ends_like(path, whole[method])
        return
    before = whole_lines(path)
    fedlora.run(resume=path)
    assert_ends_like(path, whole[method], before)


@pytest.mark.parametrize("method", METHODS)
def test_killed_resumed_killed_resumed(
    driver: Driver, keys: dict[str, Any], whole: dict[str, Path], tmp_path: Path, method: str
) -> None:
    path = begin(driver, tmp_path, {**keys, "method": method}, point="no metrics line yet")
    for point in ("in a client's steps", "half a metrics line"):
        before = whole_lines(path)
        driver.kill("run", "--resume", path, point=point, n=1)
        assert (path / "metrics.jsonl").read_bytes().startswith(before)
    before = whole_lines(path)
    assert driver("run", "--resume", path) == 0, driver.stderr
    assert_ends_like(path, whole[method], before)
    assert driver("run", "--resume", path) == 2
    assert "the run is complete" in driver.stderr


@pytest.fixture(scope="module")
def stopped(driver: Driver, keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed in round 3, with rounds 1 and 2 on the disk."""
    path = tmp_path_factory.mktemp("stopped")
    return begin(driver, path, {**keys, "method": "exact"}, point="before training", n=5)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


STATE = "state/server.safetensors"


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip, STATE),
    (flip, WEIGHTS),
    (flip, "manifest.json"),
    (cut, STATE),
    (cut, "state/state.json"),
    (cut, "manifest.json"),
    (Path.unlink, STATE),
    (Path.unlink, "state/state.json"),
    (Path.unlink, "manifest.json"),
]


@pytest.mark.parametrize(("damage", "file"), DAMAGES, ids=[f"{d.__name__} {f}" for d, f in DAMAGES])
def test_damaged_newest(
    stopped: Path,
    whole: dict[str, Path],
    out: Path,
    damage: Callable[[Path], None],
    file: str,
) -> None:
    shutil.copytree(stopped, out)
    assert sorted(p.name for p in out.glob("round-*")) == ["round-1", "round-2"]
    damage(out / "round-2" / file)
    before, events = whole_lines(out), list[Any]()
    fedlora.run(resume=out, report=events.append)
    [warning] = [e["message"] for e in events if e["event"] == "warning"]
    assert events[0]["resumed_from"] == 1
    assert str(out / "round-2") in warning
    assert "damaged" in warning
    assert "going on from round 1" in warning
    if file != "manifest.json":
        assert file in warning
    assert_ends_like(out, whole["exact"], before)


def test_all_damaged(stopped: Path, whole: dict[str, Path], out: Path) -> None:
    shutil.copytree(stopped, out)
    flip(out / "round-1" / STATE)
    flip(out / "round-2" / STATE)
    before, events = whole_lines(out), list[Any]()
    fedlora.run(resume=out, report=events.append)
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert events[0]["resumed_from"] == 0
    assert [w.endswith("going on from the start") for w in warnings] == [True, True]
    assert_ends_like(out, whole["exact"], before)


def test_killed_while_pruning_then_everything_damaged(
    driver: Driver, keys: dict[str, Any], whole: dict[str, Path], tmp_path: Path
) -> None:
    """What a killed pruning left must not be in the way of the next one."""
    path = begin(driver, tmp_path, {**keys, "method": "exact"}, point="while pruning")
    for saved in path.glob("round-*"):
        flip(saved / STATE)
    fedlora.run(resume=path)
    assert_ends_like(path, whole["exact"])


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Evaluations give these losses, one after the other."""
    left = iter(losses)
    monkeypatch.setattr(rating, "evaluate", lambda *a, **k: {"loss": next(left)})


def judged(keys: dict[str, Any], out: Path) -> fedlora.Config:
    """A run that keeps the best round and stops early."""
    return fedlora.Config(
        **{
            **keys,
            "num_rounds": 9,
            "output_dir": str(out),
            "load_best_model_at_end": True,
            "early_stopping_patience": 3,
        }
    )


def test_best_round_and_patience_survive(
    keys: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [5.0, 1.0, 3.0, 3.0, 2.0, 0.5])
    with pytest.raises(StoppedError):
        fedlora.run(judged(keys, out), callbacks=[stop_after(3)])
    result = fedlora.run(resume=out)
    assert result.best_round == 1
    # Three evaluations without a better one: rounds 2, 3 and, after the resume, 4.
    assert [line["round"] for line in result.metrics if line["event"] == "round"] == [1, 2, 3, 4]
    assert read_metrics(out)[-1] == {"event": "end", "round": 4, "final": 1, "best": 1}
    assert final(out) == (out / "round-1" / WEIGHTS).read_bytes()
    assert final(out) != (out / "round-4" / WEIGHTS).read_bytes()


def test_a_damaged_best_round_is_not_loaded(
    keys: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [5.0, 1.0, 3.0, 3.0, 2.0]
    scripted(monkeypatch, losses)
    with pytest.raises(StoppedError):
        fedlora.run(judged(keys, out), callbacks=[stop_after(3)])
    good = (out / "round-1" / WEIGHTS).read_bytes()
    flip(out / "round-1" / WEIGHTS)
    scripted(monkeypatch, losses[4:])
    with pytest.raises(CheckpointError, match=r"round-1: damaged .*best round"):
        fedlora.run(resume=out)
    assert not (out / "final").exists()
    # What the message proposes works.
    for saved in out.glob("round-*"):
        shutil.rmtree(saved)
    scripted(monkeypatch, losses)
    fedlora.run(resume=out)
    assert final(out) == good


def refused(path: Path, *argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Resume in vain: exit code 2, one message, the directory untouched."""
    before = snapshot(path)
    assert main(["run", "--resume", str(path), *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fedlora: ")
    assert snapshot(path) == before
    return captured.err


@pytest.fixture
def movable(
    keys: dict[str, Any], tiny_llama: Path, site_files: Path, tmp_path: Path
) -> tuple[Path, Path, Path]:
    """A run stopped after round 1, with a model and data of its own that a test may change."""
    model, data, out = tmp_path / "model", tmp_path / "data", tmp_path / "out"
    shutil.copytree(tiny_llama, model)
    shutil.copytree(site_files, data)
    config = {
        **keys,
        "model_name_or_path": str(model),
        "train_file": str(data / "site_*.jsonl"),
        "output_dir": str(out),
    }
    with pytest.raises(StoppedError):
        fedlora.run(fedlora.Config(**config), callbacks=[stop_after(1)])
    return model, data, out


def test_another_base_is_refused(
    movable: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, out = movable
    tensors = load_file(model / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "the base differs" in refused(out, capsys=capsys)


def test_other_data_are_refused(
    movable: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, data, out = movable
    site = data / "site_2.jsonl"
    site.write_text(site.read_text().replace('"completion": "', '"completion": "x', 1))
    assert "the data differs" in refused(out, capsys=capsys)


def test_a_missing_site_is_refused(
    movable: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, data, out = movable
    (data / "site_2.jsonl").unlink()
    assert "3 files" in refused(out, capsys=capsys)


def test_other_keys_are_refused(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(stopped, "--learning_rate", "0.5", "--seed", "7", capsys=capsys)
    assert "learning_rate: 0.01 when it began, 0.5 now" in message
    assert "seed: 42 when it began, 7 now" in message
    assert "max_steps" not in message


def test_another_file_is_refused_key_by_key(
    keys: dict[str, Any], stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {**keys, "method": "flora", "client_ranks": [8, 4, 2, 4], "num_rounds": 5}
    config = write(tmp_path / "other.yaml", other)
    before = snapshot(stopped)
    assert main(["run", str(config), "--resume", str(stopped)]) == 2
    message = capsys.readouterr().err
    assert "method: 'exact' when it began, 'flora' now" in message
    assert "client_ranks: [8, 4, 2, 2] when it began, [8, 4, 2, 4] now" in message
    assert "num_rounds: 3 when it began, 5 now" in message
    assert "learning_rate" not in message
    assert snapshot(stopped) == before


def test_the_same_keys_are_accepted(
    keys: dict[str, Any], stopped: Path, whole: dict[str, Path], out: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, out)
    config = write(tmp_path / "same.yaml", {**keys, "method": "exact"})
    assert main(["run", str(config), "--resume", str(out), "--max_steps", "2"]) == 0
    assert_ends_like(out, whole["exact"])


@pytest.mark.parametrize(
    "ranks",
    [{"client_ranks": 4}, {"client_ranks": None, "lora_r": 2}, {"rank_choices": [2, 4, 8]}],
    ids=["one for all", "none", "drawn"],
)
def test_ranks_that_were_filled_in_are_no_difference(
    keys: dict[str, Any], out: Path, ranks: dict[str, Any]
) -> None:
    values = {**keys, "client_ranks": None, **ranks, "num_rounds": 2, "output_dir": str(out)}
    config = fedlora.Config(**values)
    with pytest.raises(StoppedError):
        fedlora.run(config, callbacks=[stop_after(1)])
    assert fedlora.run(config, resume=out).metrics[-1]["round"] == 2


def test_other_drawn_ranks_are_a_difference(keys: dict[str, Any], out: Path) -> None:
    values = {**keys, "client_ranks": None, "rank_choices": [2, 4], "output_dir": str(out)}
    with pytest.raises(StoppedError):
        fedlora.run(fedlora.Config(**values), callbacks=[stop_after(1)])
    values["rank_choices"] = [3]
    with pytest.raises(InputError, match=r"client_ranks: .* when it began, \[3, 3, 3, 3\] now"):
        fedlora.run(fedlora.Config(**values), resume=out)


def test_nothing_to_resume(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("absent", "empty", "file"):
        for more in ([], ["--seed", "1"]):
            assert main(["run", "--resume", str(tmp_path / name), *more]) == 2
            message = capsys.readouterr().err
            assert "nothing to resume; there is no config.yaml" in message
            assert name in message
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty", "file"]
    assert "nothing to resume; the run is complete" in refused(whole["exact"], capsys=capsys)


GOES_ON = [name for name in fedlora.methods.METHODS if name != "fedsa"]


@pytest.mark.parametrize("method", in_turn(GOES_ON, 0))
def test_a_complete_run_says_how_it_is_trained_further(
    keys: dict[str, Any], out: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """The command works as it is printed, and begins where the run ended."""
    rule = fedlora.methods.METHODS[method]
    own = {"method": method, "client_ranks": [8, 4, 2, 2] if rule.mixed_ranks else 4}
    own |= {"num_rounds": 1, "server_momentum": 0.0, "output_dir": str(out)}
    ended = fedlora.run(fedlora.Config(**{**keys, **own})).evaluations[1]
    capsys.readouterr()
    said = refused(out, "--num_rounds", "3", capsys=capsys)
    assert "nothing to resume; the run is complete" in said
    assert "For 2 more rounds start a new run from its result (rounds count from 1 again)" in said
    words = shlex.split(said.strip().splitlines()[-1])
    assert words[:2] == ["fedlora", "run"]
    assert main([*words[1:], "--max_steps", "1"]) == 0
    lines = read_metrics(Path(words[-1]))
    assert [x["round"] for x in lines if x["event"] == "round"] == [1, 2]
    begun = next(x for x in lines if x["event"] == "start")["evaluation"]
    assert begun["loss"] == pytest.approx(ended["loss"], rel=1e-5)


def test_more_rounds_than_an_unfinished_run_was_begun_with(
    stopped: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, out)
    said = refused(out, "--num_rounds", str(ROUNDS + 4), capsys=capsys)
    assert f"num_rounds: {ROUNDS} when it began, {ROUNDS + 4} now" in said
    assert "When it has ended: For 4 more rounds start a new run" in said
    assert "and the server's momentum begins anew" in said
    assert "more rounds" not in refused(out, "--num_rounds", "1", capsys=capsys)


def test_clients_own_models_are_not_taken_up_by_a_new_run(
    keys: dict[str, Any], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"method": "fedsa", "client_ranks": 2, "num_rounds": 1, "output_dir": str(out)}
    fedlora.run(fedlora.Config(**{**keys, **own}))
    said = refused(out, "--num_rounds", "5", capsys=capsys)
    assert "begin a new run with --num_rounds 5" in said
    assert "--init_adapter" not in said


def test_a_second_process_is_refused(driver: Driver, stopped: Path, out: Path) -> None:
    shutil.copytree(stopped, out)
    codes = list[int]()

    def meanwhile(result: fedlora.RoundResult) -> None:
        before = snapshot(out)
        codes.append(driver("run", "--resume", out))
        assert "another process is writing to this run" in driver.stderr
        assert snapshot(out) == before

    fedlora.run(resume=out, callbacks=[meanwhile])
    assert codes == [2]


def test_resumed_from_another_directory(
    keys: dict[str, Any],
    site_files: Path,
    tiny_llama: Path,
    whole: dict[str, Path],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Relative paths and patterns are those of where the run began, and so are the bytes."""
    monkeypatch.chdir(site_files)
    relative = {
        "model_name_or_path": os.path.relpath(tiny_llama, site_files),
        "train_file": "site_*.jsonl",
        "eval_file": "eval.jsonl",
    }
    config = fedlora.Config(**{**keys, **relative, "output_dir": str(out)})
    with pytest.raises(StoppedError):
        fedlora.run(config, callbacks=[stop_after(1)])
    monkeypatch.chdir(out.parent)
    assert fedlora.run(resume=out).metrics[-1]["round"] == ROUNDS
    assert_ends_like(out, whole["exact"])


def test_two_sound_rounds_are_kept_beside_a_damaged_one(keys: dict[str, Any], out: Path) -> None:
    config = {**keys, "num_rounds": 5, "save_total_limit": 2, "output_dir": str(out)}
    with pytest.raises(StoppedError):
        fedlora.run(fedlora.Config(**config), callbacks=[stop_after(4)])
    flip(out / "round-4" / "adapter_model.safetensors")
    with pytest.raises(StoppedError):
        fedlora.run(resume=out, callbacks=[stop_after(4)])
    sound = [p.name for p in out.iterdir() if p.name in ("round-3", "round-4")]
    assert len(sound) == 2
    for name in sound:
        verify(out / name)


def twice_as_many(model: Any, dataset: Any, training: Any) -> dict[str, Any]:
    """A local training of a user's own."""
    return train(model, dataset, training)


def test_another_local_training_is_refused(keys: dict[str, Any], out: Path) -> None:
    config = fedlora.Config(**{**keys, "output_dir": str(out)})
    with pytest.raises(StoppedError):
        fedlora.run(config, train_function=twice_as_many, callbacks=[stop_after(1)])
    with pytest.raises(fedlora.InputError, match="the train function differs"):
        fedlora.run(resume=out)
    assert fedlora.run(resume=out, train_function=twice_as_many).final_dir.is_dir()


def growing(keys: dict[str, Any], out: Path) -> dict[str, Any]:
    """A run whose checkpoints grow from round to round."""
    return {
        **keys,
        "client_ranks": [2, 1, 1, 1],
        "server_momentum": 0.0,
        "save_total_limit": None,
        "output_dir": str(out),
    }


@pytest.fixture(scope="module")
def grown(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grown") / "out"
    fedlora.run(fedlora.Config(**growing(keys, path)))
    return path


def test_a_file_that_cannot_grow(driver: Driver, keys: dict[str, Any], tmp_path: Path) -> None:
    out, grown = tmp_path / "out", tmp_path / "grown"
    # The adapter is what outgrows the whole state of round 1, which holds no directions here.
    flora = {"method": "flora"}
    fedlora.run(fedlora.Config(**growing(keys, grown) | flora))
    saved = [grown / f"round-{n}" for n in range(1, ROUNDS + 1)]
    sizes = [max(p.stat().st_size for p in path.rglob("*.safetensors")) for path in saved]
    assert sizes[1] < sizes[2]
    config = write(tmp_path / "config.yaml", growing(keys, out) | flora)
    assert driver("run", config, file_size=sizes[1] + 1) == 2
    assert_explained(driver.stderr, out)
    assert sorted(p.name for p in out.glob("round-*")) == ["round-1", "round-2"]
    assert snapshot(out / "round-2")[STATE] == snapshot(grown / "round-2")[STATE]
    assert [p.name for p in out.glob(".*.partial")] == []
    before = whole_lines(out)
    assert driver("run", "--resume", out, file_size=sizes[1] + 1) == 2
    assert_explained(driver.stderr, out)
    assert driver("run", "--resume", out) == 0, driver.stderr
    assert_ends_like(out, grown, before)


def tensor_files(path: Path) -> dict[str, bytes]:
    return {name: x for name, x in snapshot(path).items() if name.endswith(".safetensors")}


KILLS_OF_A_CHANGE = [
    ("before a link", 1),  # of round 2 to the whole state of round 1
    ("before a link", 3),  # of round 3 to the change of round 2
    ("half of a change", 1),
    ("a change and no more", 2),
    ("a change and no more", 3),
    ("before the manifest", 3),
    ("manifest, no name yet", 3),  # of round 2
]


@pytest.mark.parametrize(
    ("point", "n"), KILLS_OF_A_CHANGE, ids=[f"{p}-{n}" for p, n in KILLS_OF_A_CHANGE]
)
def test_killed_while_a_change_is_saved(
    driver: Driver, keys: dict[str, Any], grown: Path, tmp_path: Path, point: str, n: int
) -> None:
    """Where a round is saved as what it has changed, and links to what lies in the one before."""
    path = begin(driver, tmp_path, growing(keys, tmp_path / "out"), point=point, n=n)
    before = whole_lines(path)
    assert driver("run", "--resume", path) == 0, driver.stderr
    assert_ends_like(path, grown, before)
    assert tensor_files(path) == tensor_files(grown)  # resumed or not


def test_adapters_are_saved_every_so_many_rounds(
    driver: Driver,
    keys: dict[str, Any],
    grown: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The state is saved in every round; the run, killed or not, is the same."""
    some = growing(keys, tmp_path / "out") | {"save_adapter_rounds": 2}
    path = begin(driver, tmp_path, some, point="no metrics line yet", n=3)
    assert [(path / f"round-{n}" / WEIGHTS).exists() for n in (1, 2, 3)] == [False, True, False]
    fedlora.run(resume=path)
    assert_ends_like(path, grown)
    assert [(path / f"round-{n}" / STATE).exists() for n in (1, 2, 3)] == [True, True, True]
    assert main(["eval", str(path), "--round", "1"]) == 2
    assert "no adapter in round-1; there are 2; save_adapter_rounds" in capsys.readouterr().err
    assert main(["eval", str(path), "--round", "2", "--num_threads", "1"]) == 0


def test_the_best_round_has_an_adapter(
    keys: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rounds have one: the run may end with it."""
    scripted(monkeypatch, [5.0, 1.0, 3.0, 3.0, 2.0, 0.5])
    config = judged(keys, out).model_copy(update={"save_adapter_rounds": 7})
    assert fedlora.run(config).best_round == 1
    assert final(out) == (out / "round-1" / WEIGHTS).read_bytes()
    assert not (out / "round-4" / WEIGHTS).exists()


def test_a_round_holds_what_it_has_changed(grown: Path) -> None:
    assert sorted(path.name for path in (grown / f"round-{ROUNDS}" / "state").iterdir()) == [
        "change-2.safetensors",
        "change-3.safetensors",
        "server-1.safetensors",
        "server.safetensors",
        "state.json",
    ]
    size = (grown / "round-2" / "state" / "change-2.safetensors").stat().st_size
    assert size < (grown / "round-1" / STATE).stat().st_size


def assert_explained(message: str, out: Path) -> None:
    assert message.startswith(f"fedlora: {out}: no space left on the device")
    assert message.endswith(f"fedlora run --resume {out}\n")
    assert message.count("\n") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 640 KB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(path)]
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root to mount a small disk")
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(keys: dict[str, Any], grown: Path, small_disk: Path) -> None:
    out, ballast = small_disk / "out", small_disk / "ballast"

    def fill(result: fedlora.RoundResult) -> None:
        with ballast.open("ab") as file:  # all but 24 KB, which takes no second round
            free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
            file.write(b"\0" * (free - 24 * 1024))

    config = fedlora.Config(**growing(keys, out))
    with pytest.raises(FedloraError, match="no space left on the device") as raised:
        fedlora.run(config, callbacks=[fill])
    assert str(raised.value).endswith(f"fedlora run --resume {out}")
    assert [p.name for p in out.glob("round-*")] == ["round-1"]
    assert snapshot(out / "round-1")[STATE] == snapshot(grown / "round-1")[STATE]
    assert [p.name for p in out.glob(".*.partial")] == []
    with pytest.raises(FedloraError, match="no space left on the device"):
        fedlora.run(resume=out)
    ballast.unlink()
    before = whole_lines(out)
    fedlora.run(resume=out)
    assert_ends_like(out, grown, before)


def test_a_full_disk_at_the_start(keys: dict[str, Any], small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        file.write(b"\0" * os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize)
    with pytest.raises(InputError, match=r"output_dir: .*: No space left on device"):
        fedlora.run(fedlora.Config(**{**keys, "output_dir": str(small_disk / "out")}))
    assert not (small_disk / "out").exists()


def test_every_kill_point_is_used() -> None:
    used = {point for point, _ in [*KILLS, *KILLS_OF_A_CHANGE]} | {"before the directory"}
    listed = itertools.takewhile(lambda s: s != "}", DRIVER.split("POINTS = {\n")[1].splitlines())
    assert {s.split('"')[1] for s in listed if s.startswith('    "')} == used
    assert torch.get_num_threads() == 1
