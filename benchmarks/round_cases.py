"""The cases of benchmarks/round.py, each run in a process of its own: one line of JSON each."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FEDLORA = ("fedlora", "defaults", "memory-ten", "memory-one", "memory-auto")
"""Cases that run this package; the others are "peft" and "flower"."""


def run_case(case: str, spec_path: Path, began: float, actors: int = 1) -> None:
    """Run a case and print its line.

    Args:
        case: its name.
        spec_path: what `round_models.prepare` wrote.
        began: when (of `time.time`) the process was started.
        actors: of flwr's simulation, each with its share of the threads.
    """
    spec = json.loads(spec_path.read_text())
    with _quiet_output():
        found = _found(case, spec, actors, began)
    print(json.dumps({"case": case, **found}))


def _found(case: str, spec: dict[str, Any], actors: int, began: float) -> dict[str, Any]:
    if case == "flower":
        from round_flower import run as run_flower

        found = run_flower(spec, actors)
        return {**found, "whole": time.time() - began}
    import torch

    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    if case == "peft":
        from round_peft import run as run_peft

        found = run_peft(spec)
        found["dtype"] = spec["dtype"]
    else:
        found = run_fedlora(case, spec)
    out = {
        **found,
        "whole": time.time() - began,
        "peak": peak_bytes(),
        "threads": torch.get_num_threads(),
    }
    # `perf_counter` and `time` differ by a constant.
    out["load"] = found["loaded"] + time.time() - time.perf_counter() - began
    if torch.cuda.is_available():
        out["peak_device"] = torch.cuda.max_memory_allocated()
    if case in ("fedlora", "defaults"):
        out["limit"] = limit(spec, out["dtype"])
    return out


def settings(case: str, spec: Mapping[str, Any], output_dir: Path) -> dict[str, Any]:
    """The configuration of a fedlora case."""
    values = {**spec["config"], "output_dir": str(output_dir)}
    if case != "defaults":
        values["dtype"] = spec["dtype"]
    if case.startswith("memory"):
        # A second round lies on what the first one merged; what one pass takes shows in the first.
        values |= {"num_rounds": 2, "max_steps": 1, "cohort_size": 1}
        if case == "memory-auto":
            values |= {"num_rounds": 1, "cohort_size": "auto", "cohort_memory": budget_gib()}
        if spec["long_rows"]:
            values["train_file"] = str(Path(spec["scratch"]) / "long_*.jsonl")
        if case == "memory-one":
            values |= {"client_ranks": [max(spec["ranks"])], "num_clients": 1}
            if values.get("dataset_name"):
                values |= {"partition": "iid", "partition_column": None}
            else:
                values["train_file"] = values["train_file"].replace("*", "0")
    return values


def run_fedlora(case: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """This package through its public API.

    Returns:
        rounds (seconds: of the whole round, checkpoint included; train, aggregate, evaluate and
        client_seconds as it says itself; losses; tokens), loaded, dtype, memory before the first
        round, the budget of the case memory-auto, and what the run settled about cohorts.
    """
    import tempfile

    from fedlora import Config, run
    from fedlora.config.yaml_file import read_yaml

    with tempfile.TemporaryDirectory() as scratch:
        values = settings(case, spec, Path(scratch) / "run")
        began, ended = list[float](), list[float]()
        loaded, before = list[float](), list[int]()

        def report(event: Mapping[str, Any]) -> None:
            if event["event"] == "begin":
                loaded.append(time.perf_counter())
            if event["event"] == "round_begin":
                before.append(_size_now())
                began.append(time.perf_counter())

        result = run(
            Config(**values),
            report=report,
            callbacks=[lambda _: ended.append(time.perf_counter())],
        )
        resolved = read_yaml(Path(result.output_dir) / "config.yaml")
    lines = [line for line in result.metrics if line["event"] == "round"]
    rounds = []
    for line, first, last in zip(lines, began, ended, strict=True):
        metrics = [x["metrics"] for x in line["clients"]]
        rounds.append(
            {
                "seconds": last - first,
                **line["seconds"],
                "client_seconds": sum(x.get("seconds", 0.0) for x in metrics),
                "losses": [x["loss_last"] for x in metrics],
                "tokens": sum(x["tokens"] for x in metrics),
            }
        )
    concerns = {key: value for key, value in resolved.items() if key.startswith("cohort")}
    return {
        "rounds": rounds,
        "loaded": loaded[0],
        "before": before[0],
        "budget": budget_gib() * 2**30,
        "dtype": resolved["dtype"],
        "concerns": concerns,
    }


def limit(spec: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The GEMM rate of this process at the model's shapes, and what a round must compute.

    The rate is the better of a mean micro-batch's tokens and four times as many.
    """
    import torch
    from round_limit import ModelShape, gemm_rate, useful_flops
    from round_models import trained_rows

    shape = ModelShape(
        {name: (m, n) for name, (m, n) in spec["shapes"].items()},
        spec["layers"],
        spec["attention"],
        spec["hidden"],
        spec["vocabulary"],
    )
    flops, tokens = [], []
    for number in range(1, spec["rounds"] + 1):
        of_round, count = 0.0, 0
        for client, rank in enumerate(spec["ranks"]):
            rows = [
                (len(row["input_ids"]), sum(label != -100 for label in row["labels"][1:]))
                for row in trained_rows(dict(spec), client, number)
            ]
            of_round += useful_flops(shape, rows, rank)
            count += sum(length for length, _ in rows)
        flops.append(of_round)
        tokens.append(count)
    mean = max(64, round(tokens[0] / len(spec["ranks"]) / spec["steps"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype)
    rates = {t: gemm_rate(shape.matrices, t, kind, device) for t in (mean, 4 * mean)}
    best = max(rates, key=lambda t: rates[t])
    return {"flops": flops, "tokens": tokens, "rate": rates[best], "gemm_tokens": best}


def budget_gib() -> float:
    """What one pass may take in the case memory-auto: less than there is, to see it kept."""
    import torch

    return 16.0 if torch.cuda.is_available() else 4.0


def _size_now() -> int:
    """Of what the peak is measured of: memory of the GPU, or of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def peak_bytes() -> int:
    """The largest resident size this process has had.

    Not `ru_maxrss` on Linux: that begins at the size of the process that started this one.
    """
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(key: str) -> int:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(key)), 0)


@contextmanager
def _quiet_output() -> Iterator[None]:
    """Libraries that print do so to standard error; the line of JSON stands alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
