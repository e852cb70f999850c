"""What each saving of local training brings: the same steps with one of them switched off.

    python benchmarks/savings.py            # about four minutes on two cores
    python benchmarks/savings.py --compiled # torch_compile too: several minutes more
    python benchmarks/savings.py --threads 1
    python benchmarks/savings.py --embedded # of the embedded default, in CPU seconds on one thread
    python benchmarks/savings.py --checkpoint # of saving a round: two minutes and 4 GB of disk
    python benchmarks/savings.py --calibration # of measuring how to train: seven minutes

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
    "decoder layers through autograd, operation by operation": {"layers": False},
    "attention through torch's kernel, not products": {"kernel": True},
    "the frozen update added for every client, not once a round": {"refreeze": True},
    "recomputed activations (gradient_checkpointing)": {"checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, ten clients in one pass": {"dtype": "bfloat16", "cohort": 10},
    "bfloat16, attention through torch's kernel": {"dtype": "bfloat16", "kernel": True},
    "bfloat16, padded": {"dtype": "bfloat16", "padded": True},
}
EMBEDDED = ("everything on", "last layer on all tokens", "decoder layers through autograd")
COMPILED = {"torch_compile": {"compile": True}}


def measure(case: dict[str, Any], spec: Path, threads: int) -> dict[str, float]:
    """Seconds and peak memory of the second of two rounds."""
    import resource

    import torch

    torch.set_num_threads(threads)
    from transformers.utils import logging

    from fedlora.client.cohort import train_cohort
    from fedlora.client.local_training import LocalTraining
    from fedlora.config.config import Config
    from fedlora.lowrank import LowRank
    from fedlora.model import packed_attention
    from fedlora.model.acceleration import accelerate
    from fedlora.model.lora_layer import ClientAdapter
    from fedlora.model.passes import runner_of
    from fedlora.runs.session import assemble
    from fedlora.seeds import Purpose, fresh_factors

    logging.set_verbosity_error()
    if case.get("kernel"):
        packed_attention.LONGEST_PRODUCT = 0
    keys = json.loads(spec.read_text())["config"]
    keys |= {"dtype": case.get("dtype", "float32"), "cohort_size": 1, "num_threads": threads}
    session = assemble(Config(**keys))
    base, ranks = session.base, session.federation.ranks
    passes = runner_of(base.model)
    if not case.get("layers", not case.get("kernel")):
        passes.packed_forward.decoder_layers = []  # they hold attention as products
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


def measure_embedded(rounds: int = 8, steps: int = 2) -> dict[str, float]:
    """CPU seconds of a step of the embedded default's ten clients, on one thread.

    The cases take turns in one process, so that whatever else runs on the machine slows all of them
    down; of each the fastest turn counts. A turn is a round of `steps` steps, with what a round
    costs a client besides them.
    """
    import tempfile

    import torch

    torch.set_num_threads(1)
    from fedlora import Config
    from fedlora.client.trainer import train
    from fedlora.config.sources import layered
    from fedlora.config.yaml_file import read_yaml
    from fedlora.embedded import CONFIG
    from fedlora.engines.local import make_worker
    from fedlora.model.packed_forward import PackedForward
    from fedlora.model.passes import runner_of
    from fedlora.runs.course import make_server
    from fedlora.runs.session import assemble, starting_state

    config = Config(**layered(read_yaml(CONFIG), {"num_threads": 1, "max_steps": steps}))
    session = assemble(config)
    worker, forward = make_worker(session, train, {}), runner_of(session.base.model).packed_forward
    layers, own_output = forward.decoder_layers, PackedForward.trunk_output
    size = session.config.cohort_size
    assert isinstance(size, int)

    def output_of_all(self: Any, ids: Any, wanted: Any = None, counts: Any = ()) -> Any:
        out = own_output(self, ids)
        if wanted is not None:
            out["last_hidden_state"] = out.last_hidden_state[:, wanted]
        return out

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sent = list(make_server(session, starting_state(session), Path(scratch)).plan().values())
        for number in range(rounds + 1):
            for name in EMBEDDED:
                forward.decoder_layers = [] if name == EMBEDDED[2] else layers
                PackedForward.trunk_output = output_of_all if name == EMBEDDED[1] else own_output
                began = time.process_time()
                for begin in range(0, len(sent), size):
                    worker.handle_together(sent[begin : begin + size])
                seconds = (time.process_time() - began) / steps
                if number:  # the first turn warms up
                    found[name] = min(found.get(name, seconds), seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="torch_compile too")
    parser.add_argument("--embedded", action="store_true", help="of the embedded default instead")
    parser.add_argument("--checkpoint", action="store_true", help="of saving a round instead")
    parser.add_argument("--calibration", action="store_true", help="of measuring how to train")
    parser.add_argument("--case")
    parser.add_argument("--spec", type=Path)
    options = parser.parse_args()
    if options.case:
        print(
            json.dumps(measure({**CASES, **COMPILED}[options.case], options.spec, options.threads))
        )
        return
    if options.checkpoint:
        from checkpoint import table

        write("savings_checkpoint.md", table())
        return
    if options.calibration:
        from calibration import MODELS, compare

        write("calibration.md", compare(MODELS))
        return
    if options.embedded:
        of_cases = measure_embedded()
        lines = [
            "# What each saving brings in the embedded default",
            "",
            f"{machine()}; CPU seconds of a step of all ten clients, one thread, the fastest of",
            "eight turns.",
            "",
            "| | CPU s a step | to the first line |",
            "|---|---|---|",
        ]
        for name, x in of_cases.items():
            lines.append(f"| {name} | {x:.3f} | {x / of_cases[EMBEDDED[0]]:.2f} |")
        write("savings_embedded.md", "\n".join(lines) + "\n")
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
