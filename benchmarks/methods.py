"""All rules on the embedded default: exact match, aggregation error, bytes up and down.

    .venv/bin/python benchmarks/methods.py [--seed 0] [--processes 2]

Dirichlet 0.2 by skill, ten clients; mixed ranks 64 32 16 16 8 8 4 4 4 4 and rank 16 everywhere; 5
rounds of 20 steps and 34 of 3. One seed: its standard error is about 2 points of exact match from
the 480 held-out rows alone, and seeds differ by more. Under an hour on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from common import in_parallel, machine, write

from fedlora.methods import METHODS

MIXED = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
RANKS = {"mixed ranks": MIXED, "rank 16": [16] * 10}
SCHEDULES = {"5 x 20": (5, 20), "34 x 3": (34, 3)}


def one(method: str, ranks: str, schedule: str, seed: int) -> dict[str, Any]:
    """A run's last exact match, mean aggregation error, and bytes."""
    import fedlora
    from fedlora.commands.console import quiet_libraries
    from fedlora.config.sources import layered
    from fedlora.config.yaml_file import read_yaml
    from fedlora.embedded import CONFIG

    quiet_libraries()
    rounds, steps = SCHEDULES[schedule]
    with tempfile.TemporaryDirectory() as scratch:
        values = {
            "method": method,
            "client_ranks": RANKS[ranks],
            "num_rounds": rounds,
            "max_steps": steps,
            "eval_rounds": 0,
            "seed": seed,
            "num_threads": 1,
            "save_total_limit": 2,
            "output_dir": f"{scratch}/run",
        }
        result = fedlora.run(fedlora.Config(**layered(read_yaml(CONFIG), values)))
    lines = [line for line in result.metrics if line["event"] == "round"]
    errors = [line["aggregation_error"] for line in lines if line["aggregation_error"] is not None]
    return {
        "exact_match": result.evaluations[rounds]["exact_match"],
        "error": sum(errors) / len(errors) if errors else None,
        "up": sum(line["bytes_up"] for line in lines),
        "down": sum(line["bytes_down"] for line in lines),
    }


def main() -> None:
    """Run all, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [
        (method, ranks, schedule, arguments.seed)
        for schedule in SCHEDULES
        for ranks in RANKS
        for method, rule in METHODS.items()
        if rule.mixed_ranks or ranks != "mixed ranks"
    ]
    found = dict(zip(jobs, in_parallel(one, jobs, arguments.processes), strict=True))
    lines = [
        f"# All rules, one seed ({arguments.seed})",
        "",
        f"`benchmarks/methods.py`, {machine()}.",
        "Exact match in % at the end, mean aggregation error of a round, MB up and down over the",
        "whole run, ten clients. `fedsa`: the mean of the clients' own models on the common rows.",
    ]
    for schedule in SCHEDULES:
        for ranks in RANKS:
            lines += ["", f"## {schedule}, {ranks}", ""]
            lines += ["| method | exact match | agg. error | up | down |", "|---|---|---|---|---|"]
            part = {job[0]: x for job, x in found.items() if job[1:3] == (ranks, schedule)}
            for method, x in sorted(part.items(), key=lambda pair: -pair[1]["exact_match"]):
                error = "-" if x["error"] is None else f"{x['error']:.1e}"
                sizes = f"{x['up'] / 1e6:.1f} | {x['down'] / 1e6:.1f}"
                match = f"{100 * x['exact_match']:.1f}"
                lines.append(f"| `{method}` | {match} | {error} | {sizes} |")
    write("methods.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
