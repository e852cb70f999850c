"""NVIDIA FLARE as the engine: messages, start-up, memory, whole runs, and FLARE's own way to train.

    .venv/bin/python benchmarks/engines.py nvflare

`measures(quick, sites)` deploys a federation with `fedlora deploy nvflare` on loopback. At first
workers that send back what they get stand for those of the sites. "To the workers" is what a run
does: a message is one buffer, and goes on over the worker's socket. "FLARE alone" sends arrays of
numpy to the sites' job processes and back. Then the sites' own workers train the embedded base, and
FLARE's client API with TRL and PEFT does the same (`engines_nvflare_peer.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines_nvflare_job as job
import engines_nvflare_peer as peer
from engines_echo import echoes
from engines_nvflare_federation import ROWS, Federation, federated, working

import fedlora
from fedlora.embedded import BASE_DIR, instructions
from fedlora.engines.nvflare.kit import EXECUTOR, TASK
from fedlora.engines.nvflare.order import POLL
from fedlora.runs.events import Event

MANY = 448  # tensors of an adapter with A and B in 224 modules
SMALL = [[0, 20, 0], [50, 2, 0], [50, 2, 1], [50, 2, MANY]]
"""Megabytes each way, rounds, and number of arrays; 0: to the workers."""
LARGE = [[200, 2, 0], [200, 2, 1], [200, 2, MANY]]
MEMORY = [[20, 2, 0]]
HELD_OUT = ROWS // 4
RANK = 8
TRAINING = {
    "model_name_or_path": "embedded",
    "lora_target_modules": "all-linear",
    "lora_alpha": "2r",
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 16,
    "max_length": 64,
    "dtype": "float32",
    "eval_exact_match": False,
    "num_threads": 1,
}
"""The settings of the embedded default."""


def measures(quick: bool, sites: int = 3) -> Iterator[tuple[str, str]]:
    """Cases and figures."""
    rounds, steps = (3, 4) if quick else (8, 20)
    with federated(sites) as federation:
        yield f"server and {sites} sites up, s", f"{federation.seconds:.1f}"
        with echoes(federation.directory, sites) as sockets:
            federation.answer_at(sockets)
            yield from messages(federation, SMALL if quick else SMALL + LARGE)
            yield memory(federation)
        with working(federation):
            yield from default(federation, rounds, steps)
            yield from ours(federation, rounds)
        yield from theirs(federation, rounds)
    more = 6 if quick else 30
    with federated(more) as federation, echoes(federation.directory, more) as sockets:
        federation.answer_at(sockets)
        yield memory(federation)


def messages(federation: Federation, cases: list[list[int]]) -> Iterator[tuple[str, str]]:
    """Seconds of rounds of one exchange, the fastest of each case."""
    submitted, told = _exchanged(federation, "messages", cases)
    yield "from submitting a job to its first message, s", f"{told['began'] - submitted:.1f}"
    for (megabytes, _, arrays), seconds in zip(cases, told["seconds"], strict=True):
        what = "trivial round"
        if megabytes:
            how = f"FLARE alone, arrays: {arrays}" if arrays else "to the workers"
            what = f"round of {megabytes} MB down and up, {how}"
        yield f"{what}, {len(federation.names)} sites, s", f"{seconds:.2f}"


def memory(federation: Federation) -> tuple[str, str]:
    """What the server's job process needs at most for rounds of messages."""
    _, told = _exchanged(federation, "memory", MEMORY)
    what = f"server's job, {MEMORY[0][0]} MB down and up, {len(federation.names)} sites, MiB"
    return what, f"{told['peak_mib']:.0f}"


def default(federation: Federation, rounds: int, steps: int) -> Iterator[tuple[str, str]]:
    """Seconds of the embedded default's rounds that are not training: over FLARE, and without."""
    keys = {**TRAINING, "method": "exact", "client_ranks": [64, 16, 4], "max_steps": steps}
    what = "embedded default, s a round"
    own = str(federation.folder("site-*") / "rows.jsonl")
    together = {"train_file": own, "client_eval_fraction": HELD_OUT / ROWS}
    for how, more in (
        ("in process", {**together, "cohort_size": 1, "use_cpu": True}),
        ("nvflare", _over(federation)),
    ):
        run = _run(federation, f"default {how}", {**keys, **more, "num_rounds": rounds})
        outside, evaluation = list[float](), list[float]()
        for line in run.lines[1:]:
            trained = [client["metrics"]["seconds"] for client in line["clients"]]
            training = (sum if how == "in process" else max)(trained)
            outside.append(sum(line["seconds"].values()) - training)
            evaluation.append(line["seconds"]["evaluate"])
        yield f"{what}, outside training, {how}", f"{sum(outside) / len(outside):.2f}"
        yield f"{what}, of it evaluation, {how}", f"{sum(evaluation) / len(evaluation):.2f}"


def ours(federation: Federation, rounds: int) -> Iterator[tuple[str, str]]:
    """A round of FedAvg over FLARE with fedlora at the sites."""
    keys = {**TRAINING, "method": "fedit", "client_ranks": RANK, "num_train_epochs": 1}
    run = _run(federation, "ours", {**keys, **_over(federation), "num_rounds": rounds})
    lines, sites = run.lines[1:], len(federation.names)
    # The global adapter is also sent to be evaluated, after each round.
    down = (line["bytes_down"] + line["evaluation_bytes_down"] for line in lines)
    yield from _training(
        "fedlora",
        run.seconds,
        max(client["metrics"]["seconds"] for line in lines for client in line["clients"]),
        max(down) // sites,
        max(line["bytes_up"] for line in lines) // sites,
    )


def theirs(federation: Federation, rounds: int) -> Iterator[tuple[str, str]]:
    """The same with FLARE's client API, TRL and PEFT."""
    outputs, sites = {}, {}
    for seed, name in enumerate(federation.names):
        folder = federation.folder(name)
        rows = list(instructions(ROWS, seed, "train"))
        files = {"train": rows[HELD_OUT:], "test": rows[:HELD_OUT]}
        for part, those in files.items():
            lines = ({"prompt": row["prompt"], "completion": row["completion"]} for row in those)
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        outputs[name], sites[name] = folder / "told.json", folder / "asked.json"
        asked = {
            "model": str(BASE_DIR),
            "train": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "output": str(outputs[name]),
            "rank": RANK,
            "batch": TRAINING["per_device_train_batch_size"],
            "learning_rate": TRAINING["learning_rate"],
            "max_length": TRAINING["max_length"],
        }
        sites[name].write_text(json.dumps(asked))
    peer.write_job(federation.directory / "peer", sites, str(BASE_DIR), RANK, rounds)
    federation.carry(federation.directory / "peer")
    told = [json.loads(path.read_text()) for path in outputs.values()]
    assert all(len(lines) == rounds for lines in told), told
    began = [line["began"] for line in told[0]]
    lines = [line for site in told for line in site[1:]]
    yield from _training(
        "client API with TRL",
        (began[-1] - began[1]) / (rounds - 2),
        max(line["training"] for line in lines),
        max(line["bytes_down"] for line in lines),
        max(line["bytes_up"] for line in lines),
    )


def _training(
    who: str, seconds: float, training: float, down: int, up: int
) -> Iterator[tuple[str, str]]:
    what = f"FedAvg of rank {RANK}, one epoch"
    yield f"{what}, {who}: s a round", f"{seconds:.2f}"
    yield f"{what}, {who}: of it training, slowest site, s", f"{training:.2f}"
    yield f"{what}, {who}: KB down, up, for a site", f"{down / 1e3:.0f}, {up / 1e3:.0f}"


class _Run:
    """A run, when its rounds were told, and their lines.

    Args:
        keys: of the configuration.
    """

    def __init__(self, keys: dict[str, Any]) -> None:
        self._told = list[float]()
        result = fedlora.run(fedlora.Config(**keys), report=self._hear)
        self.lines = [line for line in result.metrics if line["event"] == "round"]

    def _hear(self, event: Event) -> None:
        if event["event"] == "round":
            self._told.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a round, without the first one."""
        return (self._told[-1] - self._told[0]) / (len(self._told) - 1)


def _run(federation: Federation, name: str, keys: dict[str, Any]) -> _Run:
    return _Run({**keys, "output_dir": str(federation.directory / name)})


def _over(federation: Federation) -> dict[str, Any]:
    return {"engine": "nvflare", "kit": str(federation.kit), "server_evaluation": False}


def _exchanged(
    federation: Federation, name: str, cases: list[list[int]]
) -> tuple[float, dict[str, Any]]:
    """Exchange messages; gives when that was submitted, and what was measured."""
    output = federation.directory / f"{name}.json"
    path = _job(federation.directory / name, federation.names, cases, output)
    submitted = federation.carry(path)
    return submitted, json.loads(output.read_text())


def _job(path: Path, names: list[str], cases: list[list[int]], output: Path) -> Path:
    """The job of the benchmark."""
    args = {"cases": cases, "output": str(output)}
    executors = [
        {"tasks": [TASK], "executor": {"path": EXECUTOR, "args": {}}},
        {"tasks": [job.ARRAYS], "executor": {"path": f"{job.__name__}.Echo", "args": {}}},
    ]
    workflow = {"id": "rounds", "path": f"{job.__name__}.Rounds", "args": args}
    common = {"format_version": 2, "task_data_filters": [], "task_result_filters": []}
    files = {
        "meta.json": {
            "name": path.name,
            "min_clients": len(names),
            "deploy_map": {"server": ["server"], "site": names},
            "resource_spec": {},
        },
        "server/config/config_fed_server.json": {
            **common,
            "server": {"task_request_interval": POLL},
            "workflows": [workflow],
        },
        "site/config/config_fed_client.json": {**common, "executors": executors},
    }
    for name, values in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(values))
    return path
