"""Flower as the engine: a round of messages, 50 MB and 200 MB, a simulation's start and memory.

    .venv/bin/python benchmarks/engines_flower.py messages      # three SuperNodes
    .venv/bin/python benchmarks/engines_flower.py simulation --model DIRECTORY

`messages` deploys Flower on loopback over TLS, with the sites' workers replaced by sockets that
send back what they get: what is measured is what Flower and the ClientApp cost. `simulation` runs
ten clients on Ray twice, as fedlora does (resident processes on one base) and with a base in every
actor, and prints the seconds to the first round and the proportional memory of all processes. One
JSON object a line. Two to five minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import engines_flower_app as apps

from fedlora.embedded import instructions
from fedlora.engines.flower.event_lines import read_event
from fedlora.engines.flower.run_config import bundle_text, write_bundle
from fedlora.engines.site_listener import Listener

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))

from support.flower_deployment import CONNECTION, TOOLS, deployed, simulating  # noqa: E402

SIZES = [[0, 5], [50, 2], [200, 1]]
"""Megabytes each way, and how often."""
CLIENTS = 10


class Echo:
    """A worker that sends back what it gets."""

    def __init__(self, name: str) -> None:
        self.name = name

    def handle(self, message: bytes, seconds: float | None) -> bytes:
        """The message."""
        return message

    def status(self) -> dict[str, Any]:
        """Its name."""
        return {"site": self.name}

    def cancel(self) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


@contextmanager
def echoes(directory: Path, number: int) -> Iterator[dict[str, str]]:
    """Workers that send back what they get, behind sockets: name -> path."""
    with ExitStack() as stack:
        addresses = {}
        for name in (f"site-{k}" for k in range(number)):
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            addresses[name] = str(directory / f"{name}.sock")
            server.bind(addresses[name])
            server.listen()
            Listener(server, Echo(name), token=None).start()
        yield addresses


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


def messages(sizes: list[list[int]]) -> None:
    """Seconds of rounds with three nodes."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fl")))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        sockets = stack.enter_context(echoes(directory, 3))
        deployment = stack.enter_context(deployed(directory, sockets))
        app = directory / "app"
        client = "fedlora.engines.flower.client_app:app"
        write_app(app, "engines_flower_app:echo", client, sizes=json.dumps(sizes))
        for line in deployment.flwr("run", str(app), CONNECTION, "--stream").splitlines():
            if told := measured(line):
                print(json.dumps({"case": "round of three nodes", **told}), flush=True)


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


def simulation(model: str) -> None:
    """Seconds to the first round, and memory, of ten simulated clients; both ways."""
    with tempfile.TemporaryDirectory(prefix="fl") as scratch:
        directory = Path(scratch)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        rows = [json.dumps(row) + "\n" for row in instructions(20 * CLIENTS, 0, "train")]
        (directory / "rows.jsonl").write_text("".join(rows))
        keys = {
            "model_name_or_path": model,
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
            model=model,
        )
        for app in ("ours", "theirs"):
            print(
                json.dumps({"case": f"simulation, {app}", **simulated(directory, app)}), flush=True
            )


def simulated(directory: Path, app: str) -> dict[str, Any]:
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
        options = ["--stream", "--federation-config", f"num-supernodes={CLIENTS}"]
        with subprocess.Popen(
            [TOOLS / "flwr", "run", directory / app, *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as run:
            assert run.stdout is not None
            for line in run.stdout:
                event = read_event(line) or measured(line) or {}
                if not first and event.get("round") == 1:
                    first = time.perf_counter() - began
        over.set()
    return {"first round after seconds": round(first, 1), "MiB": round(most[0])}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["messages", "simulation"])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--sizes", type=json.loads, default=SIZES)
    asked = parser.parse_args()
    if asked.what == "messages":
        messages(asked.sizes)
    else:
        simulation(asked.model)


if __name__ == "__main__":
    main()
