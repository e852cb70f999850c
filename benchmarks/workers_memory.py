"""Memory of worker processes: weights that lie in memory once, and many clients.

    python benchmarks/workers_memory.py base [--workers 1 2 4] [--methods flora exact]
    python benchmarks/workers_memory.py clients [--clients 10000] [--asked 100] [--workers 4]

`base`: a Llama of 110 M random parameters in float32, adapters in all linear layers, three rounds
of one step. The memory of all processes together (PSS: a page that several share counts once) is
read between rounds and at its peak, and given as a multiple of the base's weights, the libraries'
own memory taken off.

`clients`: the embedded model, many clients of two rows each and of ranks 8 4 2, a share of them
asked in every round. The resident memory of the server's process and of each worker, by round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import machine
from measured import in_own_process, resident
from round_models import RANKS, SETTINGS, save_model, synthetic

ROUNDS, CLIENTS, MIB = 3, 4, 2**20
SHORT = replace(SETTINGS["110m"], max_length=32, batch=1)
"""Rows so short that activations are small beside the weights."""


def proportional() -> float:
    """MiB of this process and its workers; what several processes share counts once."""
    pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
    return sum(_pss(pid) for pid in pids if pid)


def _pss(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


class Peak:
    """The most memory that a few looks a second have seen."""

    def __init__(self) -> None:
        self.most, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            try:
                self.most = max(self.most, proportional())
            except OSError:  # a worker has just ended
                continue


def quiet_run(keys: dict[str, Any], each_round: Any) -> None:
    """A run without evaluation, on one thread a process."""
    import fedlora
    from fedlora.commands.console import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        values = {
            **keys,
            "eval_rounds": 0,
            "eval_exact_match": False,
            "metric_for_best_model": "eval_loss",
            "num_threads": 1,
            "use_cpu": True,
            "save_total_limit": 1,
            "output_dir": f"{scratch}/run",
        }
        fedlora.run(fedlora.Config(**values), callbacks=[each_round])


def base_memory(workers: int, method: str, scratch: str) -> dict[str, Any]:
    """Multiples of the base's weights, between rounds and at the peak."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fedlora.engines.workers  # noqa: F401

    libraries, place = _pss(os.getpid()), Path(scratch)
    keys = {
        "model_name_or_path": str(place / "model"),
        "train_file": str(place / "site_*.jsonl"),
        "template": "prompt_completion",
        "method": method,
        "client_ranks": list(RANKS[2 : 2 + CLIENTS]),
        "lora_target_modules": "all-linear",
        "max_length": SHORT.max_length,
        "per_device_train_batch_size": SHORT.batch,
        "max_steps": 1,
        "num_rounds": ROUNDS,
        "dtype": "float32",
        "cohort_size": 1,
        "engine": "workers",
        "num_workers": workers,
    }
    idle: list[float] = []
    with Peak() as peak:
        quiet_run(keys, lambda _: idle.append(proportional() - libraries))
    weights = (place / "model" / "model.safetensors").stat().st_size / MIB
    return {"weights": weights, "idle": idle, "peak": peak.most - libraries}


def base_table(workers: list[int], methods: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        assert SHORT.shape is not None
        (Path(scratch) / "model").mkdir()
        synthetic(Path(scratch), SHORT)
        for site in sorted(Path(scratch).glob("site_*.jsonl"))[CLIENTS:]:
            site.unlink()
        save_model(SHORT.shape, SHORT.max_length, Path(scratch) / "model", "float32")
        print("| rule | workers | weights, MiB | after rounds 1 2 3, x weights | peak, x weights |")
        print("|---|---|---|---|---|")
        for method in methods:
            for number in workers:
                case = {"workers": number, "method": method, "scratch": scratch}
                found = in_own_process(__file__, "base", case)
                size = found["weights"]
                idle = " ".join(f"{x / size:.2f}" for x in found["idle"])
                print(
                    f"| {method} | {number} | {size:.0f} | {idle} | {found['peak'] / size:.2f} |",
                    flush=True,
                )


def many_clients(clients: int, asked: int, workers: int, rounds: int) -> dict[str, Any]:
    """MiB of the server's process and of every worker, and seconds, by round."""
    from fedlora.embedded import instructions

    out: list[dict[str, Any]] = []
    began = time.perf_counter()

    def look(result: Any) -> None:
        nonlocal began
        pids = sorted(p.pid for p in multiprocessing.active_children() if p.pid)
        line = {"round": result.record.round, "server": resident("VmRSS")}
        line["workers"] = [_resident_of(pid) for pid in pids]
        line["seconds"], began = time.perf_counter() - began, time.perf_counter()
        out.append(line)

    with tempfile.TemporaryDirectory() as scratch:
        rows = instructions(2 * clients, 0, "train")
        lines = [json.dumps({**row, "site": f"site {i // 2:05d}"}) for i, row in enumerate(rows)]
        file = Path(scratch) / "train.jsonl"
        file.write_text("\n".join(lines) + "\n")
        keys = {
            "model_name_or_path": "embedded",
            "train_file": str(file),
            "partition": "column",
            "partition_column": "site",
            "client_ranks": [(8, 4, 2)[i % 3] for i in range(clients)],
            "clients_per_round": asked,
            "lora_target_modules": "all-linear",
            "max_length": 64,
            "per_device_train_batch_size": 2,
            "max_steps": 1,
            "num_rounds": rounds,
            "dtype": "float32",
            "engine": "workers",
            "num_workers": workers,
        }
        quiet_run(keys, look)
    return {"rounds": out}


def _resident_of(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def clients_table(clients: int, asked: int, workers: int, rounds: int) -> None:
    case = {"clients": clients, "asked": asked, "workers": workers, "rounds": rounds}
    print(f"{clients:,} clients, {asked} a round, {workers} workers; resident MiB")
    print("| round | server | workers | s |")
    print("|---|---|---|---|")
    for line in in_own_process(__file__, "clients", case)["rounds"]:
        each = " ".join(f"{x:.0f}" for x in line["workers"])
        print(f"| {line['round']} | {line['server']:.0f} | {each} | {line['seconds']:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["base", "clients"], nargs="?")
    parser.add_argument("--workers", type=int, nargs="+")
    parser.add_argument("--methods", nargs="+", default=["flora", "exact"])
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--asked", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--case", help="used by the script itself")
    parser.add_argument("--arguments", default="{}")
    chosen = parser.parse_args()
    if chosen.case:
        function = base_memory if chosen.case == "base" else many_clients
        print(json.dumps(function(**json.loads(chosen.arguments))))
        return
    print(f"`benchmarks/workers_memory.py`, {machine()}\n")
    if chosen.what == "base":
        base_table(chosen.workers or [1, 2, 4], chosen.methods)
    else:
        clients_table(chosen.clients, chosen.asked, (chosen.workers or [4])[0], chosen.rounds)


if __name__ == "__main__":
    main()
