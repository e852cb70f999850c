"""What each saving of local training brings: the same steps with one of them switched off.

    python benchmarks/savings.py            # about four minutes on two cores
    python benchmarks/savings.py --compiled # torch_compile too: several minutes more
    python benchmarks/savings.py --threads 1

Each line is a fresh process: ten clients of ranks 64 to 4 take two steps on Dolly's real lengths
with a Llama shape of 22 M parameters (random weights), float32 unless said otherwise, after one
round of warm-up. Time is wall-clock; the ratio is to the first line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import machine, write

CASES: dict[str, dict[str, Any]] = {
    "everything on, one client at a time": {},
    "ten clients in one pass": {"cohort": 10},
    "padding and the head on all tokens, as transformers runs it": {"padded": True},
    "attention through torch's kernel, not products": {"kernel": True},
    "the frozen update added for every client, not once a round": {"refreeze": True},
    "recomputed activations (gradient_checkpointing)": {"checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, ten clients in one pass": {"dtype": "bfloat16", "cohort": 10},
    "bfloat16, attention through torch's kernel": {"dtype": "bfloat16", "kernel": True},
    "bfloat16, padded": {"dtype": "bfloat16", "padded": True},
}
COMPILED = {"torch_compile": {"compile": True}}


def measure(case: dict[str, Any], spec: Path, threads: int) -> dict[str, float]:
    """Seconds and peak memory of the second of two rounds."""
    import resource

    import torch

    torch.set_num_threads(threads)
    import fedlora.attention
    import fedlora.passes
    from transformers.utils import logging

    from fedlora.client.cohort import train_cohort
    from fedlora.client.local_training import LocalTraining
    from fedlora.config.config import Config
    from fedlora.lowrank import LowRank
    from fedlora.model.acceleration import accelerate
    from fedlora.model.lora_layer import ClientAdapter
    from fedlora.runs.session import assemble
    from fedlora.seeds import Purpose, fresh_factors

    logging.set_verbosity_error()
    if case.get("kernel"):
        fedlora.model.packed_attention.LONGEST_PRODUCT = 0
    keys = json.loads(spec.read_text())["config"]
    keys |= {"dtype": case.get("dtype", "float32"), "cohort_size": 1, "num_threads": threads}
    session = assemble(Config(**keys))
    base, ranks = session.base, session.federation.ranks
    passes = fedlora.model.passes.runner_of(base.model)
    if case.get("padded"):
        passes.packed = passes.joint = False
    accelerate(
        base.model,
        gradient_checkpointing=case.get("checkpointing", False),
        torch_compile=case.get("compile", False),
    )
    shapes = base.targets.shapes

    def adapter(client: int, rank: int) -> dict[str, LowRank]:
        fresh = fresh_factors(1, 0, client, Purpose.CLIENT_INIT, shapes)
        return {n: LowRank(fresh(n, rank), torch.zeros(m, rank)) for n, (m, _) in shapes.items()}

    client_adapters = [ClientAdapter(adapter(k, rank)) for k, rank in enumerate(ranks)]
    whole = adapter(99, 80)  # what lies frozen beside the base, of the rank it has after one round
    rows = [part.train for part in session.data.clients]
    size = case.get("cohort", 1)

    def one_round() -> int:
        tokens = 0
        for at in range(0, len(client_adapters), size):
            together = list(range(len(client_adapters)))[at : at + size]
            again = {n: LowRank(x.A, x.B) for n, x in whole.items()}  # equal, but not known
            base.load_clients(
                [again if case.get("refreeze") else whole], [client_adapters[k] for k in together]
            )
            trainings = [
                LocalTraining(client=k, per_device_train_batch_size=4, max_steps=2)
                for k in together
            ]
            done = train_cohort(base, [rows[k] for k in together], trainings)
            tokens += sum(m["tokens"] for m in done)
        return tokens

    one_round()
    began = time.perf_counter()
    tokens = one_round()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "tokens": tokens, "gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="torch_compile too")
    parser.add_argument("--case")
    parser.add_argument("--spec", type=Path)
    options = parser.parse_args()
    if options.case:
        print(
            json.dumps(measure({**CASES, **COMPILED}[options.case], options.spec, options.threads))
        )
        return
    import tempfile

    from round_models import prepare

    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        prepare("22m", Path(scratch) / "22m", 1, 2, "float32", options.threads)
        given = ["--spec", f"{scratch}/22m/spec.json", "--threads", str(options.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        for name in {**CASES, **(COMPILED if options.compiled else {})}:
            command = [sys.executable, __file__, "--case", name, *given]
            out = subprocess.run(command, env=environment, capture_output=True, text=True)
            if out.returncode:
                raise SystemExit(f"{name}: {out.stderr[-2000:]}")
            found[name] = json.loads(out.stdout.splitlines()[-1])
            print(f"  {name}: {found[name]['seconds']:.2f} s", flush=True)
    first = next(iter(found.values()))["seconds"]
    lines = [
        "# What each saving of local training brings",
        "",
        f"{machine()}; {options.threads} threads. {(__doc__ or '').split(chr(10) * 2)[2]}",
        "",
        "| | seconds a round | to the first line | tokens/s | peak GiB |",
        "|---|---|---|---|---|",
    ]
    for name, x in found.items():
        rate = x["tokens"] / x["seconds"]
        lines.append(
            f"| {name} | {x['seconds']:.2f} | {x['seconds'] / first:.2f} | {rate:,.0f} "
            f"| {x['gib']:.2f} |"
        )
    write("savings.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
