"""Which `start_fraction` should `exact` have by default? At 0 it is `flora`.

    .venv/bin/python benchmarks/start_fraction.py [--seeds 0 1 2] [--processes 2]

Tasks, all by exact match on held-out instructions except the last:
    long     the embedded default: mixed ranks, 5 rounds of 20 steps
    short    mixed ranks, 34 rounds of 3 steps
    low      every client has rank 2, 5 rounds of 20 steps: the wanted update exceeds every rank
    quad     a quadratic whose solution has rank 24, four clients of rank 4, 12 rounds of 100 steps:
             loss relative to the start; the smaller, the better
"""

from __future__ import annotations

import argparse
from typing import Any

from common import embedded_run, in_parallel, machine, mean_and_spread, write

FRACTIONS = [0.0, 0.25, 0.5, 0.75, 1.0]
TASKS: dict[str, dict[str, Any]] = {
    "long": {"eval_rounds": 0},
    "short": {"eval_rounds": 0, "num_rounds": 34, "max_steps": 3},
    "low": {"eval_rounds": 0, "client_ranks": [2] * 10},
}


def quadratic(method: str, options: dict[str, Any], seed: int) -> float:
    """Clients minimise `||W - T||^2` for one T of rank 24, through four directions each."""
    import torch

    from fedlora.federation.aggregators.mean import Mean
    from fedlora.federation.exchange import Agreement, client_start
    from fedlora.federation.messages import ClientUpdate
    from fedlora.federation.participants import Federation
    from fedlora.federation.server import Server, initial_state
    from fedlora.lowrank import LowRank, to_dense
    from fedlora.methods import METHODS

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    rule = METHODS[method]
    chosen = rule.options(**options)
    shapes = {"w": (48, 48)}
    target = torch.randn(48, 24, generator=generator) @ torch.randn(24, 48, generator=generator)
    target /= target.norm()
    agreement = Agreement(rule, chosen, shapes, seed)
    federation = Federation([4] * 4, [1] * 4, agreement)
    server = Server(federation, initial_state(federation), Mean())
    for _ in range(12):
        for client, sent in server.plan().items():
            start = client_start(sent, agreement)
            frozen = torch.zeros(48, 48)
            for part in (sent.base_delta, start.frozen):
                if "w" in part:
                    frozen = frozen + to_dense(part["w"])
            a = start.adapter["w"].A.clone().requires_grad_()
            b = start.adapter["w"].B.clone().requires_grad_()
            optimizer = torch.optim.Adam([a, b], lr=3e-3)
            for _ in range(100):
                optimizer.zero_grad()
                (frozen + b @ a - target).square().sum().backward()
                optimizer.step()
            server.accept(
                ClientUpdate(client, sent.round, {"w": LowRank(a.detach(), b.detach())}, 1)
            )
        server.commit()
    state = server.state
    reached = torch.zeros(48, 48)
    for held in (state.base_delta, state.adapter):
        if "w" in held:
            reached = reached + to_dense(held["w"])
    return float((reached - target).square().sum())


def one(task: str, method: str, options: dict[str, Any], seed: int) -> float:
    """The score of one run."""
    if task == "quad":
        return quadratic(method, options, seed)
    scores = embedded_run({**TASKS[task], **options, "method": method, "seed": seed})
    return scores[max(scores)]


def main() -> None:
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--output", default="start_fraction.md")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    tasks = [*TASKS, "quad"]
    methods = [("exact", {"start_fraction": f}) for f in arguments.fractions]

    jobs = [(t, m, o, s) for t in tasks for m, o in methods for s in arguments.seeds]
    scores = dict(
        zip([str(job) for job in jobs], in_parallel(one, jobs, arguments.processes), strict=True)
    )
    lines = [
        "# start_fraction: mean and standard deviation over seeds "
        + " ".join(map(str, arguments.seeds)),
        "",
        f"`benchmarks/start_fraction.py`, {machine()}. Exact match in %; `quad`: loss, smaller is",
        "better.",
        "",
        "| method | " + " | ".join(tasks) + " |",
        "|---" * (len(tasks) + 1) + "|",
    ]
    for method, options in methods:
        label = method if not options else f"{method}, start_fraction {options['start_fraction']}"
        cells = []
        for task in tasks:
            mean, spread = mean_and_spread(
                [scores[str((task, method, options, seed))] for seed in arguments.seeds]
            )
            cells.append(
                f"{mean:.4f} ± {spread:.4f}"
                if task == "quad"
                else f"{100 * mean:.1f} ± {100 * spread:.1f}"
            )
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    write(arguments.output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
