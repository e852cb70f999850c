"""What a run chooses by timing a few steps, against every way to train, quiet and beside a program.

    python benchmarks/calibration.py                     # about seven minutes on two quiet cores
    python benchmarks/calibration.py --models embedded 22m
    python benchmarks/calibration.py --spinning          # threads that wait as libgomp lets them

Models: the embedded one, all-MiniLM-L6-v2 on TREC, Llama shapes of 22 M and 110 M parameters on
Dolly with random weights. Of each: what `fedlora run` would choose for a long run in a fresh
process with an empty cache, and how long that takes; then a round of local training in every dtype
and place (threads of one process, worker processes) with as many clients in a pass as were chosen,
and in the chosen one with the most and the fewest, as fixed by its keys. Beside: one process that
computes without end. A choice is good if it takes at most 1.1 times as long as the best way; a
quiet choice is robust if it takes at most 2.5 times as long beside the busy process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import machine, write
from workers import busy

MODELS = ("embedded", "minilm", "22m", "110m")
STEPS = {"embedded": 5, "minilm": 3, "22m": 1, "110m": 1}
"""Of each client in the round that is timed."""
LESS: dict[str, dict[str, Any]] = {"110m": {"clients_per_round": 4, "max_length": 256}}


def keys_of(model: str, scratch: Path) -> dict[str, Any]:
    """A model's configuration, with everything open that a calibration decides."""
    if model == "minilm":
        from trec_minilm import MIXED, configuration

        keys: dict[str, Any] = configuration({"client_ranks": MIXED}).flat()
    else:
        from round_models import prepare

        prepare(model, scratch / model, 1, 2, "float32", 0)
        keys = json.loads((scratch / model / "spec.json").read_text())["config"]
    for key in ("engine", "num_workers", "num_threads", "cohort_size", "dtype"):
        keys.pop(key, None)
    if model == "embedded":
        keys["dtype"] = "float32"  # as its configuration says
    return {
        **keys,
        **LESS.get(model, {}),
        "eval_rounds": 0,
        "eval_exact_match": False,
        "metric_for_best_model": "eval_loss",
        "use_cpu": True,
        "output_dir": str(scratch / "run"),
    }


def choose(keys: dict[str, Any]) -> dict[str, Any]:
    """What a long run chooses, and what else is open."""
    from fedlora import Config
    from fedlora.runs import measured_choice
    from fedlora.runs.absolute_paths import resolve_paths
    from fedlora.runs.automatic import choose_threads
    from fedlora.runs.planning.work import clients_of_round
    from fedlora.runs.session import tokenized

    config = resolve_paths(Config(**{**keys, "num_rounds": 100_000}))
    source, tokenizer, data = tokenized(config)
    free = choose_threads(config, look=True).number
    began = time.perf_counter()
    way, words = measured_choice.choose_by_time(config, source, tokenizer, data, free)
    seconds = time.perf_counter() - began
    able = [k for k, part in enumerate(data.clients) if part.train]
    open_ways = measured_choice.candidates(
        config,
        source,
        measured_choice.trial_clients(config, data),
        clients_of_round(config, len(able)),
        len(os.sched_getaffinity(0)),  # the ways of a quiet machine are run beside others too
        forks=True,
    )
    chosen = None if way is None else [way.dtype, way.threads, way.workers, way.clients]
    return {
        "chosen": chosen,
        "words": words,
        "seconds": seconds,
        "dtypes": open_ways.dtypes,
        "places": open_ways.places,
        "sizes": open_ways.sizes,
    }


def train(keys: dict[str, Any], way: list[Any], steps: int) -> float:
    """Seconds of local training in the second of two rounds, in one way."""
    import fedlora

    dtype, threads, workers, clients = way
    engine = {"engine": "workers", "num_workers": workers} if workers else {"engine": "local"}
    fixed = {"dtype": dtype, "num_threads": threads, "cohort_size": clients, **engine}
    config = fedlora.Config(**{**keys, **fixed, "max_steps": steps, "num_rounds": 2})
    lines = [line for line in fedlora.run(config).metrics if line["event"] == "round"]
    seconds: float = lines[-1]["seconds"]["train"]
    return seconds


def ways_to_run(found: dict[str, Any]) -> list[list[Any]]:
    """The chosen size in every dtype and place, and other sizes of what was chosen."""
    dtype, threads, workers, clients = found["chosen"]
    ways = [[d, t, w, clients] for d in found["dtypes"] for t, w in found["places"]]
    for size in {found["sizes"][0], found["sizes"][-1]} - {clients}:
        ways.append([dtype, threads, workers, size])
    return ways if found["chosen"] in ways else [found["chosen"], *ways]


def case(job: dict[str, Any], environment: dict[str, str]) -> Any:
    """Do a job in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def do(job: dict[str, Any]) -> Any:
    from fedlora.commands.console import quiet_libraries

    quiet_libraries()
    if "way" not in job:
        return choose(job["keys"])
    with tempfile.TemporaryDirectory() as scratch:
        keys = {**job["keys"], "output_dir": f"{scratch}/run"}
        return train(keys, job["way"], job["steps"])


def name_of(way: list[Any]) -> str:
    dtype, threads, workers, clients = way
    place = f"{workers} processes" if workers else f"{threads} thread{'s' * (threads > 1)}"
    return f"{place}, {clients} in a pass, {dtype}"


def measure(
    model: str, keys: dict[str, Any], environment: dict[str, str]
) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Of a model, quiet and beside a busy process: what is chosen, and seconds by way."""
    found: list[tuple[dict[str, Any], dict[str, float]]] = []
    for beside in (0, 1):
        with busy(beside):
            chosen = case({"keys": keys}, environment)
            if chosen["chosen"] is None:
                raise SystemExit(f"{model}: nothing was chosen: {chosen['words']}")
            ways = ways_to_run(chosen)
            if found and found[0][0]["chosen"] not in ways:
                ways.append(found[0][0]["chosen"])  # does what is chosen when quiet stay good?
            seconds = {}
            for way in ways:
                job = {"keys": keys, "way": way, "steps": STEPS[model]}
                seconds[name_of(way)] = case(job, environment)
                print(f"{model}, {beside} busy, {name_of(way)}: {seconds[name_of(way)]:.2f} s")
        found.append((chosen, seconds))
    return found


def table(results: dict[str, list[tuple[dict[str, Any], dict[str, float]]]], waiting: str) -> str:
    """All models as Markdown."""
    lines = [
        "# What a calibration chooses",
        "",
        f"{machine()}; {waiting}. Seconds of a round's local training; `beside : quiet` is of what",
        "is chosen when the machine is quiet.",
        "",
        "| | chosen | after | s | best way | s | chosen : best | beside : quiet |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, found in results.items():
        first = name_of(found[0][0]["chosen"])
        slower = found[1][1][first] / found[0][1][first]
        for (chosen, seconds), where in zip(found, ("quiet", "beside a process"), strict=True):
            own, best = name_of(chosen["chosen"]), min(seconds, key=lambda name: seconds[name])
            robust = f"{slower:.2f}" if where != "quiet" else ""
            lines.append(
                f"| {model}, {where} | {own} | {chosen['seconds']:.1f} s | {seconds[own]:.2f} "
                f"| {best} | {seconds[best]:.2f} | {seconds[own] / seconds[best]:.2f} | {robust} |"
            )
    lines += ["", "All that was run:", "", "| | way | quiet | beside |", "|---|---|---|---|"]
    for model, ((_, quiet), (_, beside)) in results.items():
        for name in {**quiet, **beside}:
            each = [f"{x[name]:.2f}" if name in x else "" for x in (quiet, beside)]
            lines.append(f"| {model} | {name} | {each[0]} | {each[1]} |")
    return "\n".join(lines) + "\n"


def compare(models: Sequence[str], *, spinning: bool = False) -> str:
    """The table of these models.

    Args:
        models: of `MODELS`.
        spinning: threads that wait keep their core, as libgomp lets them.
    """
    from fedlora.commands.cli import WAITING

    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "HF_DATASETS_CACHE": f"{scratch}/cache"}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            environment.pop(name, None)
        environment |= {} if spinning else WAITING
        for model in models:
            results[model] = measure(model, keys_of(model, Path(scratch)), environment)
    return table(results, "waiting threads spin" if spinning else "waiting threads sleep")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--spinning", action="store_true", help="threads that wait keep a core")
    parser.add_argument("--case", help="used by the script itself: one job, as JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(do(json.loads(options.case))))
        return
    name = "calibration_spinning.md" if options.spinning else "calibration.md"
    write(name, compare(options.models, spinning=options.spinning))


if __name__ == "__main__":
    main()
