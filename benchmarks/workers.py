"""Rounds a minute with worker processes and without, on a quiet machine and beside a busy program.

    python benchmarks/workers.py [--rounds 3]

The embedded default without generating answers: ten clients of ranks 64 to 4, twenty steps a round.
Each case runs in a process of its own; seconds are the median of its rounds' local training and
aggregation, the first round apart. A busy program is one process that computes without end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common import RESULTS, machine

CORES = len(os.sched_getaffinity(0))


def cases() -> dict[str, dict[str, Any]]:
    """What is compared, by name."""
    threads = {
        f"one process, {n} thread{'s' * (n > 1)}": {"engine": "local", "num_threads": n}
        for n in sorted({1, CORES})
    }
    workers = {
        f"{n} worker{'s' * (n > 1)}": {"engine": "workers", "num_workers": n, "num_threads": 1}
        for n in sorted({1, 2, 4, CORES})
    }
    return {**threads, **workers}


def measure(keys: dict[str, Any], rounds: int) -> list[float]:
    """Seconds of the local training and aggregation of every round but the first."""
    import fedlora
    from fedlora.commands.console import quiet_libraries
    from fedlora.config.sources import layered
    from fedlora.config.yaml_file import read_yaml
    from fedlora.embedded import CONFIG

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        values = {
            **keys,
            "num_rounds": rounds + 1,
            "eval_rounds": 0,
            "eval_exact_match": False,
            "metric_for_best_model": "eval_loss",
            "output_dir": f"{scratch}/run",
        }
        result = fedlora.run(fedlora.Config(**layered(read_yaml(CONFIG), values)))
    lines = [line for line in result.metrics if line["event"] == "round"]
    return [line["seconds"]["train"] + line["seconds"]["aggregate"] for line in lines[1:]]


@contextmanager
def busy(number: int) -> Iterator[None]:
    """So many processes that compute without end, meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        time.sleep(0.5 * number)
        yield
    finally:
        for process in loops:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are measured")
    parser.add_argument("--case", help="used by the script itself: one case, as JSON")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(json.loads(arguments.case), arguments.rounds)))
        return
    seconds: dict[tuple[str, int], float] = {}
    for name, keys in cases().items():
        for beside in (0, 1):
            with busy(beside):
                command = [sys.executable, __file__, "--case", json.dumps(keys)]
                command += ["--rounds", str(arguments.rounds)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seconds[name, beside] = statistics.median(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}, {beside} busy: {seconds[name, beside]:.1f} s a round", flush=True)
    first = f"one process, {CORES} threads"
    lines = [
        "| | quiet, s a round | rounds a minute | beside a busy process, s a round | "
        "times as long |",
        "|---|---|---|---|---|",
    ]
    for name in cases():
        quiet, beside_one = seconds[name, 0], seconds[name, 1]
        lines.append(
            f"| {name} | {quiet:.1f} ({seconds[first, 0] / quiet:.2f} x {first}) | "
            f"{60 / quiet:.1f} | {beside_one:.1f} | {beside_one / quiet:.1f} |"
        )
    text = f"{machine()}; medians of {arguments.rounds} rounds.\n\n" + "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "workers.md").write_text(text)


if __name__ == "__main__":
    main()
