"""A federated round against its peers and against the arithmetic limit.

    .venv/bin/python benchmarks/round.py [--models embedded 22m 110m] [--steps N] [--rounds N]
        [--cases fedlora defaults peft flower memory] [--dtype float32] [--threads 2]
        [--flower-python build/flower/bin/python] [--quick] [--gpu]

The same clients, rows, batches, starts and steps by (a) fedlora in the peer's dtype and at its
defaults, (b) PEFT and transformers' Trainer one client after another, as FLoRA's published script
does it, (c) flwr's simulation with that Trainer, start-up included, (d) the arithmetic: useful
operations (`round_limit.useful_flops`) over the GEMM rate of the same process and dtype. Ten
clients of ranks 64 to 4, method `flora`. Every case is a process of its own, one at a time.

flwr asks for older versions of some packages than this project's pins, so (c) has an environment of
its own, which has to exist already (otherwise it is skipped):

    python3 -m venv build/flower
    build/flower/bin/pip install -r benchmarks/round_flower.txt

--quick tries every case in about a minute, on the embedded model. --gpu is for a machine with a
GPU: a Llama of 1.1 billion random parameters in bfloat16, micro-batches of 4 x 512; it needs
neither data nor flwr. `--models tiny` goes the same way on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from round_cases import FEDLORA, run_case
from round_models import ROOT, SETTINGS, prepare, unavailable
from round_table import table

CASES = ("fedlora", "defaults", "peft", "flower", "memory")
MEMORY = ("memory-one", "memory-ten", "memory-auto")
FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def main() -> None:
    """Run all, write the table."""
    arguments = _arguments()
    if arguments.case == "prepare":
        a = arguments
        prepare(a.models[0], a.spec.parent, a.rounds, a.steps, a.dtype, a.threads)
        return
    if arguments.case:
        run_case(arguments.case, arguments.spec, arguments.began, arguments.actors)
        return
    began, found, notes = time.perf_counter(), dict[str, Any](), list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models:
            reason = unavailable(model)
            if reason:
                notes.append(f"{SETTINGS[model].title} is left out: {reason}.")
                continue
            spec = _prepared(model, Path(scratch), arguments)
            cases, why = _cases_of(model, arguments)
            notes += why
            results = [_measured(case, actors, spec, arguments) for case, actors in cases]
            found[model] = {"spec": json.loads(spec.read_text()), "results": results}
    text = table(found, notes, time.perf_counter() - began)
    if arguments.quick or arguments.no_write:
        print(text)
    else:
        from common import write

        write("round_gpu.md" if arguments.gpu else "round.md", text)


def _cases_of(model: str, arguments: argparse.Namespace) -> tuple[list[tuple[str, int]], list[str]]:
    """The cases of a model, each with its number of actors, and why others are left out."""
    cases, notes = list[tuple[str, int]](), list[str]()
    for case in arguments.cases:
        if case == "memory":
            cases += [(name, 1) for name in MEMORY]
        elif case != "flower":
            cases.append((case, 1))
        elif model in arguments.flower_models:
            if arguments.flower_python.exists():
                cases += [("flower", actors) for actors in arguments.flower_actors]
            else:
                notes.append("flwr's simulation is left out: its environment is not there.")
    return cases, notes


def _prepared(model: str, scratch: Path, arguments: argparse.Namespace) -> Path:
    """Write a model's files in a process of its own, so that this one stays small."""
    setting = SETTINGS[model]
    print(f"{setting.title}: preparing", file=sys.stderr, flush=True)
    options = {
        "--case": "prepare",
        "--models": model,
        "--spec": scratch / model / "spec.json",
        "--rounds": arguments.rounds or setting.rounds,
        "--steps": arguments.steps or setting.steps,
        "--dtype": arguments.dtype or setting.dtype,
        "--threads": arguments.threads,
    }
    command = [sys.executable, __file__, *(str(x) for pair in options.items() for x in pair)]
    subprocess.run(command, env=_environment(arguments), check=True, stdout=sys.stderr)
    return scratch / model / "spec.json"


def _measured(case: str, actors: int, spec: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case in a fresh process."""
    python = str(arguments.flower_python if case == "flower" else sys.executable)
    environment = _environment(arguments)
    if case == "flower":
        environment |= {**FLOWER, "FLWR_HOME": str(spec.parent / "flwr")}
    command = [python, __file__, "--case", case, "--spec", str(spec), "--actors", str(actors)]
    print(f"  {case}", end="", file=sys.stderr, flush=True)
    done = subprocess.run(
        [*command, "--began", repr(time.time())],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(": failed\n" + done.stderr[-3000:], file=sys.stderr)
        return {"case": case, "actors": actors, "failed": True}
    out: dict[str, Any] = {**json.loads(done.stdout.splitlines()[-1]), "actors": actors}
    print(f": {out['whole']:.1f} s", file=sys.stderr, flush=True)
    return out


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Of a case: offline, so many threads, and this checkout's package whichever Python runs it."""
    out = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    paths = (out.get("PYTHONPATH"), str(Path(__file__).parent), str(ROOT / "src"))
    out["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if arguments.threads:
        out |= {key: str(arguments.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SETTINGS)
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--rounds", type=int, help="of every model; none: each model's own")
    parser.add_argument("--steps", type=int, help="of a client and round; none: each model's own")
    parser.add_argument("--dtype", help="of (a) and (b); none: float32, on a GPU bfloat16")
    parser.add_argument("--threads", type=int, help="0: torch's own choice; none: 2")
    parser.add_argument("--flower-python", type=Path, default=ROOT / "build/flower/bin/python")
    parser.add_argument("--flower-models", nargs="+", choices=SETTINGS, default=["embedded"])
    parser.add_argument("--flower-actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="try everything; nothing is written")
    parser.add_argument("--gpu", action="store_true", help="the model for a GPU")
    parser.add_argument("--no-write", action="store_true", help="print the table alone")
    parser.add_argument(
        "--case", choices=["prepare", *FEDLORA, "peft", "flower"], help=argparse.SUPPRESS
    )
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--actors", type=int, default=1, help=argparse.SUPPRESS)
    out = parser.parse_args()
    if out.gpu:
        out.models, out.cases = out.models or ["1.1b"], out.cases or ["fedlora", "peft"]
    if out.quick:
        out.models, out.rounds, out.steps = out.models or ["embedded"], 1, 2
        out.flower_actors = out.flower_actors[:1]
    out.models = out.models or ["embedded", "22m", "110m"]
    out.cases = out.cases or list(CASES)
    if out.threads is None:
        out.threads = 0 if out.gpu else 2
    return out


if __name__ == "__main__":
    main()
