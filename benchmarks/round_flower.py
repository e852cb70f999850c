"""flwr's simulation with the client of round_peft.py: ten nodes on Ray, Message API, own process.

Every actor loads the base once and keeps it. The server sends the sum of what was learnt so far as
one buffer, every node sends its factors as one buffer, since flwr's cost grows with the number of
arrays. `run_simulation` leaves out what `flwr run` does before it starts the same simulation.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from round_cases import peak_bytes
from round_models import rows_of
from round_peft import SCALE, Factors, Order, load, quiet, shares, start, train_client

_kept: dict[str, Any] = {}
"""What an actor keeps from one message to the next: settings, base, pristine weights."""

client_app = ClientApp()


@client_app.train()
def _train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    if not _kept:
        _begin(str(config["spec"]), int(config["threads"]))
    spec, base = _kept["spec"], _kept["base"]
    number, client = int(config["round"]), int(context.node_config["partition-id"])
    if _kept["round"] != number:
        _take(message.content["arrays"].to_numpy_ndarrays()[0])
        _kept["round"] = number
    rows = rows_of(spec, client)
    adapter, losses = train_client(
        base,
        _kept["tokenizer"],
        spec,
        client,
        number,
        start(spec, client, number),
        Order(spec, client, number, len(rows)),
        rows,
    )
    flat = torch.cat([part.flatten() for pair in adapter.values() for part in pair])
    content = RecordDict(
        {
            "arrays": ArrayRecord([flat.numpy()]),
            "metrics": MetricRecord(
                {
                    "client": client,
                    "rows": len(rows),
                    "loss": losses[-1],
                    "pid": os.getpid(),
                    "peak": peak_bytes(),
                }
            ),
        }
    )
    return Message(content, reply_to=message)


def _begin(path: str, threads: int) -> None:
    """Load what an actor keeps."""
    quiet()
    torch.set_num_threads(threads)
    spec = json.loads(Path(path).read_text())
    base, tokenizer = load(spec)
    pristine = {name: base.get_submodule(name).weight.detach().clone() for name in spec["shapes"]}
    _kept.update(spec=spec, base=base, tokenizer=tokenizer, pristine=pristine, round=0)


@torch.no_grad()
def _take(flat: np.ndarray[Any, Any]) -> None:
    """Set the target weights to the pristine ones and what was learnt since."""
    at, values = 0, torch.from_numpy(flat.copy())
    for name, pristine in _kept["pristine"].items():
        change = values[at : at + pristine.numel()].view_as(pristine)
        _kept["base"].get_submodule(name).weight.copy_(pristine + change.to(pristine))
        at += pristine.numel()


def _factors(flat: np.ndarray[Any, Any], spec: Mapping[str, Any], rank: int) -> Factors:
    """A node's buffer as factors."""
    at, values, out = 0, torch.from_numpy(flat.copy()), {}
    for name, (m, n) in spec["shapes"].items():
        middle, end = at + rank * n, at + rank * (m + n)
        out[name] = values[at:middle].view(rank, n), values[middle:end].view(m, rank)
        at = end
    return out


def _serve(grid: Grid, spec: Mapping[str, Any], threads: int, out: dict[str, Any]) -> None:
    """All rounds; fills `out`."""
    number = len(spec["ranks"])
    while len(nodes := list(grid.get_node_ids())) < number:
        time.sleep(0.05)
    out["loaded"] = time.perf_counter()
    sizes = {name: m * n for name, (m, n) in spec["shapes"].items()}
    total = torch.zeros(sum(sizes.values()))
    peaks: dict[int, int] = {}
    for index in range(1, spec["rounds"] + 1):
        began = time.perf_counter()
        config = {
            "spec": str(Path(spec["scratch"]) / "spec.json"),
            "round": index,
            "threads": threads,
        }
        content = RecordDict(
            {"arrays": ArrayRecord([total.numpy()]), "config": ConfigRecord(config)}
        )
        messages = [
            Message(content, dst_node_id=node, message_type="train", group_id=str(index))
            for node in nodes
        ]
        replies = list(grid.send_and_receive(messages))
        trained = time.perf_counter()
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a node failed: {reply.error.reason}")
        metrics = [reply.content["metrics"] for reply in replies]
        weights = shares([int(x["rows"]) for x in metrics])
        losses = [0.0] * number
        for reply, values, weight in zip(replies, metrics, weights, strict=True):
            client, flat = int(values["client"]), reply.content["arrays"].to_numpy_ndarrays()[0]
            at = 0
            for name, (a, b) in _factors(flat, spec, spec["ranks"][client]).items():
                part = total[at : at + sizes[name]].view(len(b), a.shape[1])
                part.addmm_(b, a, alpha=weight * SCALE)
                at += sizes[name]
            losses[client] = float(values["loss"])
            peaks[int(values["pid"])] = int(values["peak"])
        ended = time.perf_counter()
        out["rounds"].append(
            {
                "seconds": ended - began,
                "train": trained - began,
                "aggregate": ended - trained,
                "evaluate": 0.0,
                "losses": losses,
            }
        )
    out["peak"] = peak_bytes() + sum(peaks.values())


def run(spec: Mapping[str, Any], actors: int) -> dict[str, Any]:
    """The whole simulation.

    Args:
        spec: of the model.
        actors: nodes trained at a time; they share the threads.

    Returns:
        rounds, as `round_peft.run`; peak: of the server's process and the actors together;
        loaded: when all nodes had registered.
    """
    threads = spec["threads"] or os.cpu_count() or 1
    each = max(1, threads // actors)
    out: dict[str, Any] = {"rounds": [], "dtype": spec["dtype"], "threads": threads}
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        _serve(grid, spec, each, out)

    run_simulation(
        server_app,
        client_app,
        num_supernodes=len(spec["ranks"]),
        backend_config={
            "init_args": {"num_cpus": threads, "include_dashboard": False},
            "client_resources": {"num_cpus": each, "num_gpus": 0.0},
        },
    )
    if len(out["rounds"]) < spec["rounds"]:
        raise RuntimeError("flwr's simulation ended before the last round")
    return out
