"""Flower as the engine: rounds of messages, a simulation's start and memory.

    .venv/bin/python benchmarks/engines.py flower             # some six minutes on a quiet machine
    .venv/bin/python benchmarks/engines.py flower --quick     # two minutes less: no 200 MB

`measures(quick, sites)` deploys Flower on loopback over TLS; workers that send back what they get
stand for those of the sites, so that what is measured is what Flower and the ClientApp cost. Then
ten clients are simulated on Ray twice, each node in an actor of its own as on a machine of ten
cores: as fedlora does (the actors carry bytes to resident processes on one base), and with a base
in every actor as FlowerTune's client has. The seconds to the first round count from `flwr run`, the
proportional memory is that of all processes below the SuperLink.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import engines_flower_app as apps
from engines_echo import echoes

from fedlora.embedded import BASE_DIR, instructions
from fedlora.engines.flower.event_lines import read_event
from fedlora.engines.flower.run_config import bundle_text, write_bundle

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))

from support.flower_deployment import CONNECTION, TOOLS, deployed, simulating  # noqa: E402

SIZES = [[0, 5], [50, 2], [200, 1]]
"""Megabytes each way, and how often."""
CLIENTS = 10
NODES = f"num-supernodes={CLIENTS} client-resources-num-cpus=1 init-args-num-cpus={CLIENTS}"
"""Ten simulated nodes, for each of which Ray keeps an actor."""


def measures(quick: bool, sites: int = 3) -> Iterator[tuple[str, str]]:
    """Cases and figures."""
    yield from messages(SIZES[:2] if quick else SIZES, sites)
    yield from simulation()


def write_app(directory: Path, server: str, client: str, **config: str) -> None:
    """An app of the benchmark's own."""
    text = bundle_text({})
    head, _, _ = text.partition("[tool.flwr.app.config]")
    head = head.replace("fedlora.engines.flower.server_app:app", server)
    head = head.replace("fedlora.engines.flower.client_app:app", client)
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items()]
    directory.mkdir()
    (directory / "pyproject.toml").write_text(
        "\n".join([head.rstrip(), "[tool.flwr.app.config]", *lines, ""])
    )


def measured(line: str) -> dict[str, Any] | None:
    """What an app has measured, in a line of the log."""
    _, mark, text = line.partition(apps.MARK)
    return json.loads(text) if mark else None


def messages(sizes: list[list[int]], sites: int) -> Iterator[tuple[str, str]]:
    """Seconds of rounds of one exchange, the fastest of each size."""
    fastest: dict[int, float] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fl")))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        sockets = stack.enter_context(echoes(directory, sites))
        deployment = stack.enter_context(deployed(directory, sockets))
        app = directory / "app"
        client = "fedlora.engines.flower.client_app:app"
        write_app(app, "engines_flower_app:echo", client, sizes=json.dumps(sizes), nodes=str(sites))
        log = deployment.flwr("run", str(app), CONNECTION, "--stream")
        for line in log.splitlines():
            if told := measured(line):
                size, seconds = told["megabytes"], told["seconds"]
                fastest[size] = min(seconds, fastest.get(size, seconds))
        if len(fastest) < len(sizes):  # flwr itself ends with 0
            raise SystemExit(log)
    for megabytes, seconds in fastest.items():
        what = "trivial round"
        if megabytes:
            what = f"round of {megabytes} MB down and up, to the workers"
        yield f"{what}, {sites} sites, s", f"{seconds:.2f}"


def proportional_memory(root: int) -> float:
    """MiB of a process and all that it has started; what is shared counts once."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    total, todo = 0.0, [root]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))
    return total


def simulation() -> Iterator[tuple[str, str]]:
    """Seconds to the first round, and memory, of ten simulated clients; both ways."""
    with tempfile.TemporaryDirectory(prefix="fl") as scratch:
        directory = Path(scratch)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        rows = [json.dumps(row) + "\n" for row in instructions(20 * CLIENTS, 0, "train")]
        (directory / "rows.jsonl").write_text("".join(rows))
        keys = {
            "model_name_or_path": str(BASE_DIR),
            "train_file": str(directory / "rows.jsonl"),
            "num_clients": CLIENTS,
            "num_rounds": 2,
            "max_steps": 1,
            "max_length": 64,
            "use_cpu": True,
            "dtype": "float32",
            "output_dir": str(directory / "out"),
        }
        write_bundle(directory / "ours", keys, events=True)
        write_app(
            directory / "theirs",
            "engines_flower_app:rounds",
            "engines_flower_app:heavy",
            model=str(BASE_DIR),
            nodes=str(CLIENTS),
        )
        whose = {"ours": "resident processes on one base", "theirs": "a base in every actor"}
        for app, how in whose.items():
            first, most = simulated(directory, app)
            yield f"simulation of {CLIENTS}, {how}: to the first round, s", f"{first:.1f}"
            yield f"simulation of {CLIENTS}, {how}: MiB", f"{most:.0f}"


def simulated(directory: Path, app: str) -> tuple[float, float]:
    """Seconds to the first round, and the largest memory seen."""
    home = directory / f"home of {app}"
    home.mkdir()
    with simulating(home) as (environment, link):
        most, over = [0.0], threading.Event()

        def watch() -> None:
            while not over.wait(0.5):
                most[0] = max(most[0], proportional_memory(link.pid))

        threading.Thread(target=watch, daemon=True).start()
        began, first = time.perf_counter(), 0.0
        options, log = ["--stream", "--federation-config", NODES], list[str]()
        with subprocess.Popen(
            [TOOLS / "flwr", "run", directory / app, *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as run:
            assert run.stdout is not None
            for line in run.stdout:
                log.append(line)
                event = read_event(line) or measured(line) or {}
                if not first and event.get("round") == 1:
                    first = time.perf_counter() - began
        over.set()
    if not first:
        raise SystemExit("".join(log))
    return first, most[0]
