"""What the benchmarks share: many short runs, one thread each, as many at a time as cores."""

from __future__ import annotations

import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def embedded_run(overrides: Mapping[str, Any]) -> dict[int, float]:
    """The embedded default with other keys; exact match (share) by evaluated round."""
    import fedlora
    from fedlora.commands.console import quiet_libraries
    from fedlora.config.sources import layered
    from fedlora.config.yaml_file import read_yaml
    from fedlora.embedded import CONFIG

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        values = {"num_threads": 1, "output_dir": f"{scratch}/run", **overrides}
        result = fedlora.run(fedlora.Config(**layered(read_yaml(CONFIG), values)))
    return {number: found["exact_match"] for number, found in result.evaluations.items()}


def alone_run(overrides: Mapping[str, Any], client: int) -> dict[int, float]:
    """One client of the embedded default by itself; exact match by evaluated round."""
    import fedlora
    from fedlora.commands.console import quiet_libraries
    from fedlora.config.sources import layered
    from fedlora.config.yaml_file import read_yaml
    from fedlora.embedded import CONFIG
    from fedlora.engines.local import run_session
    from fedlora.runs.lone_session import alone
    from fedlora.runs.session import assemble

    quiet_libraries()
    values = layered(read_yaml(CONFIG), {"num_threads": 1, **overrides})
    with tempfile.TemporaryDirectory() as scratch:
        session = assemble(fedlora.Config(**values))
        result = run_session(alone(session, client, Path(scratch) / "run"))
    return {number: found["exact_match"] for number, found in result.evaluations.items()}


def in_parallel(function: Any, jobs: Sequence[tuple[Any, ...]], processes: int) -> list[Any]:
    """`function(*job)` for every job, in fresh processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    began = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        out = []
        for number, future in enumerate(futures, 1):
            out.append(future.result())
            print(f"  {number}/{len(jobs)} runs, {time.perf_counter() - began:.0f} s", flush=True)
    return out


def machine() -> str:
    """One line on where figures were measured."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return (
        f"{os.cpu_count()} x {model}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (0 for one value)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


def write(name: str, text: str) -> None:
    """Print a result and keep it under `benchmarks/results/`."""
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text)
    print(f"written: {RESULTS.name}/{name}")
