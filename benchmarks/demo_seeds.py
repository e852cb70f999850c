"""The figures of the README: methods on the embedded default over seeds, a table and a picture.

    .venv/bin/python benchmarks/demo_seeds.py [--seeds 0 1 2] [--processes 2]

Mixed ranks 64 32 16 16 8 8 4 4 4 4, Dirichlet 0.2 by skill, 5 rounds of 20 steps; another seed is
another partition, initialisation and order of batches. "alone" is the mean over the ten clients.
"""

from __future__ import annotations

import argparse

from common import RESULTS, alone_run, embedded_run, in_parallel, machine, mean_and_spread, write

METHODS = ("exact", "flora", "zero_pad")
CLIENTS = 10


def main() -> None:
    """Run all seeds, write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    seeds = arguments.seeds
    jobs = [({"method": method, "seed": seed},) for method in METHODS for seed in seeds]
    together = in_parallel(embedded_run, jobs, arguments.processes)
    lone_jobs = [({"seed": seed}, client) for seed in seeds for client in range(CLIENTS)]
    lone = in_parallel(alone_run, lone_jobs, arguments.processes)
    curves: dict[str, list[dict[int, float]]] = {
        method: together[i * len(seeds) : (i + 1) * len(seeds)] for i, method in enumerate(METHODS)
    }
    curves["alone"] = []
    best = []
    for i in range(len(seeds)):
        part = lone[i * CLIENTS : (i + 1) * CLIENTS]
        curves["alone"].append({r: sum(c[r] for c in part) / CLIENTS for r in part[0]})
        best.append(max(c[max(c)] for c in part))
    rounds = sorted(curves["exact"][0])
    lines = [
        "# Exact match (%) by round: mean ± standard deviation over seeds "
        + " ".join(map(str, seeds)),
        "",
        f"`benchmarks/demo_seeds.py`, {machine()}.",
        "",
        "| method | " + " | ".join(map(str, rounds)) + " |",
        "|---" * (len(rounds) + 1) + "|",
    ]
    for name, of_seed in curves.items():
        cells = []
        for number in rounds:
            mean, spread = mean_and_spread([100 * curve[number] for curve in of_seed])
            cells.append(f"{mean:.1f} ± {spread:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    mean, spread = mean_and_spread([100 * b for b in best])
    lines += ["", f"The best single client alone ends at {mean:.1f} ± {spread:.1f}."]
    write("demo_seeds.md", "\n".join(lines) + "\n")
    _draw(curves, rounds)


def _draw(curves: dict[str, list[dict[int, float]]], rounds: list[int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for (name, of_seed), marker, style in zip(
        curves.items(), "osD^", ("-", "--", "-.", ":"), strict=True
    ):
        stats = [mean_and_spread([100 * curve[r] for curve in of_seed]) for r in rounds]
        means, spreads = [s[0] for s in stats], [s[1] for s in stats]
        axes.errorbar(rounds, means, spreads, label=name, marker=marker, linestyle=style, capsize=3)
    axes.set_xlabel("round")
    axes.set_ylabel("exact match (%)")
    axes.set_title("ten clients of ranks 64 to 4, one model")
    axes.set_xticks(rounds)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "demo_seeds.png", dpi=130)


if __name__ == "__main__":
    main()
