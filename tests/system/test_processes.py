"""The guide across processes as it is written, and the failures that only processes have."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora.config.config import Config
from fedlora.config.yaml_file import read_yaml
from fedlora.engines import carrier
from fedlora.runs.events import Event
from fedlora.runs.metrics_log import read_metrics
from support.courses import tensor_files
from support.guide_shell import shell
from support.paths import REPOSITORY

GUIDE = REPOSITORY / "docs" / "guides" / "processes.md"
NAMES = ("alpha", "beta", "gamma")

# Three workers and a run between them; runs/test_sites.py has the same in one process.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    """The guide's shell blocks: rows, site files, workers, server and run, the end."""
    return re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def federation(blocks: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The guide's directory with its workers up; they are stopped as the guide stops them."""
    # A socket's path has to be short.
    directory = Path(tmp_path_factory.mktemp("g"))
    rows, files, workers, *_, stop = blocks
    shell(rows, directory)
    assert "alpha: ready" in shell(files, directory)
    inside = directory / "federation"
    try:
        shell(workers.replace("2> $site.log &", "> $site.out 2> $site.log &"), directory)
        yield inside
        told = shell(stop, directory)
        assert "beta: idle since" in told
        assert all(f"{name}: stopped" in told for name in NAMES)
    finally:
        for name in NAMES:
            try:
                carrier.stop(str(inside / f"{name}.sock"))
            except carrier.SiteError:
                continue
    assert not list(inside.glob("*.sock"))


@pytest.fixture(scope="module")
def guided(blocks: list[str], federation: Path) -> Path:
    """The output directory of the run that the guide makes."""
    told = shell(blocks[3], federation.parent)
    assert "ended after round 3" in told
    return federation / "out"


def keys_of(federation: Path, **changed: Any) -> dict[str, Any]:
    """The server's configuration, to be run in this process."""
    keys = read_yaml(federation / "server.yaml")
    sites = {name: str(federation / f"{name}.sock") for name in NAMES}
    return {**keys, "sites": sites, "num_threads": 1, **changed}


def in_one_process(keys: dict[str, Any], rows: Path, out: Path) -> fedlora.Result:
    """The same run without processes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        shutil.copy(rows / f"{name}.jsonl", out.parent / f"{number}.jsonl")
    left_out = ("engine", "sites", "server_evaluation")
    plain = {key: x for key, x in keys.items() if key not in left_out}
    own = {"train_file": str(out.parent / "[0-2].jsonl"), "client_eval_fraction": 0.25}
    beside = {"cohort_size": 1, "use_cpu": True, "output_dir": str(out)}
    return fedlora.run(Config(**{**plain, **own, **beside}))


def test_the_guide_gives_the_bytes_of_one_process(
    federation: Path, guided: Path, tmp_path: Path
) -> None:
    quiet = in_one_process(keys_of(federation), federation, tmp_path / "rows" / "out")
    assert tensor_files(quiet.output_dir) == tensor_files(guided)
    lines = read_metrics(guided)
    for line, same in zip(lines[1:], quiet.metrics[1:], strict=True):
        assert line.get("client_evaluations") == same.get("client_evaluations")


def test_a_worker_that_is_killed_starts_again_and_changes_nothing(
    federation: Path, guided: Path, tmp_path: Path
) -> None:
    keys = keys_of(
        federation, method="ffa", client_ranks=4, max_steps=1, output_dir=str(tmp_path / "out")
    )
    killed: list[int] = []

    def kill(event: Event) -> None:
        if event["event"] == "client_end" and not killed:
            killed.append(carrier.status(str(federation / "beta.sock"))["pid"])
            os.kill(killed[0], signal.SIGKILL)

    result = fedlora.run(Config(**keys), report=kill)
    quiet = in_one_process(keys, federation, tmp_path / "rows" / "out")
    assert tensor_files(quiet.output_dir) == tensor_files(result.output_dir)
    after = carrier.status(str(federation / "beta.sock"))
    assert after["restarts"] >= 1
    assert after["pid"] != killed[0]


RUN = "import sys; from fedlora.commands.cli import main; main(['run', *sys.argv[1:]])"


def test_a_server_that_is_killed_goes_on(federation: Path, guided: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sites = [f"{name}={federation / name}.sock" for name in NAMES]
    with subprocess.Popen(
        [
            sys.executable, "-c", RUN, str(federation / "server.yaml"),
            "--sites", *sites, "--num_rounds", "60", "--max_steps", "1", "--output_dir", str(out),
        ],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
    ) as server:  # fmt: skip
        until = time.monotonic() + 200
        while not (out / "round-2").exists() and time.monotonic() < until:
            time.sleep(0.02)
        server.kill()
    first = sorted(path.name for path in out.glob("round-*"))
    assert "round-2" in first
    stop_at = max(int(name.removeprefix("round-")) for name in first) + 2

    def stop(result: Any) -> None:
        if result.record.round == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedlora.run(resume=out, callbacks=[stop])
    keys = keys_of(federation, num_rounds=stop_at, max_steps=1, output_dir=str(tmp_path / "whole"))
    whole = tensor_files(fedlora.run(Config(**keys)).output_dir)
    name = f"round-{stop_at}/state/server.safetensors"
    assert tensor_files(out)[name] == whole[name]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sites": {"alpha": "nowhere.sock"}}, r"sites: alpha: .*nowhere\.sock: no worker has"),
        ({"sites": {"delta": "alpha.sock"}}, "sites: delta: .* calls itself alpha"),
        ({"client_ranks": [8, 4, 32]}, "sites: gamma: lora_r: 32 is asked for, .* at most 16"),
    ],
)
def test_mistakes(
    federation: Path,
    guided: Path,
    changed: dict[str, Any],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One message that says what to do, exit code 2, and nothing is written."""
    from fedlora.commands.cli import main

    monkeypatch.chdir(federation)
    arguments = ["run", "server.yaml", "--output_dir", str(tmp_path / "out")]
    if "sites" in changed:
        arguments += ["--sites", *(f"{name}={x}" for name, x in changed["sites"].items())]
        arguments += ["--client_ranks", "8"]
    else:
        arguments += ["--client_ranks", *map(str, changed["client_ranks"])]
    assert main(arguments) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
