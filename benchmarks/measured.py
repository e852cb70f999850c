"""A measured case runs in a process of its own, one thread: its peak memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def resident(key: str = "VmHWM") -> float:
    """MiB of this process: `VmHWM` at its peak, `VmRSS` now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def limits() -> dict[str, float]:
    """This machine on one thread: memory copy in GB/s, read and written, and GEMM in GFLOP/s."""
    import torch

    x, y = torch.randn(1024, 1024), torch.randn(16 * 1024 * 1024)
    x @ x, y.clone()
    gemm = min(seconds_of(lambda: x @ x) for _ in range(5))
    copy = min(seconds_of(lambda: y.clone()) for _ in range(5))
    return {"copy": 2 * y.nbytes / copy / 1e9, "gemm": 2 * 1024**3 / gemm / 1e9}


def in_own_process(script: str, case: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`script --case case --arguments JSON` on one thread; the last line it prints is JSON."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, script, "--case", case, "--arguments", json.dumps(arguments)],
        env={**os.environ, **one},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))
