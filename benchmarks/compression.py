"""What does it cost to send adapters in 16 or 8 bits, and what does it save?

    .venv/bin/python benchmarks/compression.py [--seeds 0 1 2] [--rounds 5] [--steps 20]

The embedded default under `exact`, with `compression` none, bf16 and int8, the last two with and
without `compression_feedback`: the held-out loss and exact match after the last round, bytes of all
rounds, and how much of what clients learnt was lost on its way in the last round.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from common import in_parallel, machine, mean_and_spread, write

WAYS: list[dict[str, Any]] = [
    {"compression": "none"},
    {"compression": "bf16"},
    {"compression": "bf16", "compression_feedback": False},
    {"compression": "int8"},
    {"compression": "int8", "compression_feedback": False},
]
MEASURES = ("loss", "exact match", "MB up", "MB down", "lost up", "lost down")


def one(way: dict[str, Any], seed: int, rounds: int, steps: int) -> dict[str, float]:
    """What one run ends with."""
    import fedlora
    from fedlora.commands.console import quiet_libraries
    from fedlora.config.sources import layered
    from fedlora.config.yaml_file import read_yaml
    from fedlora.embedded import CONFIG

    quiet_libraries()
    how = {"num_rounds": rounds, "max_steps": steps, "eval_rounds": 0, "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        values = {"num_threads": 1, "output_dir": f"{scratch}/run", **how, **way}
        result = fedlora.run(fedlora.Config(**layered(read_yaml(CONFIG), values)))
    lines = [line for line in result.metrics if line["event"] == "round"]
    scores = lines[-1]["evaluation"]
    return {
        "loss": scores["loss"],
        "exact match": 100 * scores["exact_match"],
        "MB up": sum(line["bytes_up"] for line in lines) / 1e6,
        "MB down": sum(line["bytes_down"] for line in lines) / 1e6,
        "lost up": 100 * lines[-1].get("compression_error_up", 0.0),
        "lost down": 100 * lines[-1].get("compression_error_down", 0.0),
    }


def main() -> None:
    """Run all ways and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="compression.md")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    jobs = [(way, seed, given.rounds, given.steps) for way in WAYS for seed in given.seeds]
    found = in_parallel(one, jobs, given.processes)
    runs = f"{given.rounds} rounds of {given.steps} steps, seeds {' '.join(map(str, given.seeds))}"
    lines = [
        f"# compression: the embedded default under exact, {runs}",
        "",
        f"`benchmarks/compression.py`, {machine()}. Mean and standard deviation over the seeds.",
        "Lost: % of what clients learnt (up) or of what was handed out (down) in the last round.",
        "",
        "| compression | " + " | ".join(MEASURES) + " |",
        "|---" * (len(MEASURES) + 1) + "|",
    ]
    for number, way in enumerate(WAYS):
        begin = number * len(given.seeds)
        own = found[begin : begin + len(given.seeds)]
        label = way["compression"] + (
            "" if way.get("compression_feedback", True) else ", no feedback"
        )
        cells = []
        for name in MEASURES:
            mean, spread = mean_and_spread([scores[name] for scores in own])
            cells.append(f"{mean:.4g} ± {spread:.2g}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    write(given.output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
