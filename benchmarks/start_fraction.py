"""How should a client of `exact` start? Starts and peers, in paired runs that can be continued.

    .venv/bin/python benchmarks/start_fraction.py --tasks quad short --starts default balanced \
        --seeds 20 21 22 [--processes 2]

Every run that is done is a line of `results/starts.jsonl`, and is not made again. The tables of all
lines are written to `results/starts.md`; `--starts` without names writes them alone.

Tasks:
    long, short, low    the embedded default: mixed ranks in 5 rounds of 20 steps, or in 34 of 3;
                        or rank 2 everywhere, less than the wanted update has, in 5 of 20
    long-iid-mixed ...  the cells of `fedlora study rules`, at batches of 4: 4 rounds of 30 steps
                        (long) or 40 of 3 (short), iid or dirichlet, mixed or equal ranks; and
                        long-saturated, short-saturated: rank 2 everywhere
    demo                what `fedlora demo` runs
    quad                a quadratic whose solution has rank 24, four clients of rank 4, 12 rounds
                        of 100 steps: loss relative to the start; the smaller, the better
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

from common import RESULTS, in_parallel, machine, mean_and_spread, write

FILE = RESULTS / "starts.jsonl"
_SCHEDULES = {
    "long": {"num_rounds": 4, "max_steps": 30},
    "short": {"num_rounds": 40, "max_steps": 3},
}
_DIVISIONS = {
    "iid": {"partition": "iid"},
    "dirichlet": {"partition": "dirichlet", "partition_alpha": 0.2},
}
_RANKS: dict[str, dict[str, Any]] = {
    "mixed": {"client_ranks": [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]},
    "equal": {"client_ranks": 16},
}
_STUDY = {"per_device_train_batch_size": 4}
TASKS: dict[str, dict[str, Any]] = {
    "long": {},
    "short": {"num_rounds": 34, "max_steps": 3},
    "low": {"client_ranks": [2] * 10},
    **{
        f"{schedule}-{division}-{ranks}": {
            **_STUDY, **_SCHEDULES[schedule], **_DIVISIONS[division], **_RANKS[ranks]
        }
        for schedule, division, ranks in product(_SCHEDULES, _DIVISIONS, _RANKS)
    },
    **{
        f"{schedule}-saturated": {
            **_STUDY, **_SCHEDULES[schedule], **_DIVISIONS["dirichlet"], "client_ranks": 2
        }
        for schedule in _SCHEDULES
    },
    "demo": {"num_rounds": 4},
}  # fmt: skip


class Way(NamedTuple):
    """A way to start: a rule, its options, and what it puts in the place of the rule's own rows."""

    method: str = "exact"
    options: Mapping[str, Any] = {}
    balanced: bool = False


STARTS = {
    "default": Way(),
    "uncapped": Way(options={"start_cap": None}),
    "balanced": Way(options={"start_cap": None}, balanced=True),
    "balanced, capped": Way(balanced=True),
    "cap 1/3": Way(options={"start_cap": 1 / 3}),
    "cap 4/3": Way(options={"start_cap": 4 / 3}),
    "start_fraction 0": Way(options={"start_fraction": 0.0}),
    "start_fraction 0.5": Way(options={"start_fraction": 0.5}),
    "start_fraction 1": Way(options={"start_fraction": 1.0}),
    **{name: Way(name) for name in ("flora", "fedmomentum", "fedex", "fedsvd")},
}


@contextmanager
def balanced_rows() -> Iterator[None]:
    """Put starts with `||A_i|| = ||B_i||` in the place of long rows.

    Rows that a cap has shortened differ between ranks and stay in the stack, which costs traffic
    and no exactness.
    """
    from fedlora.lowrank import LowRank, balance
    from fedlora.methods import exact, tracking

    def capped(starts: LowRank, rank: int, options: exact.Options) -> LowRank:
        if options.start_cap is None:
            return starts
        limit = options.start_cap / rank
        values = starts.A.norm(dim=1) * starts.B.norm(dim=0)
        share = (limit / values.clamp_min(limit)).sqrt()
        return LowRank(starts.A * share[:, None], starts.B * share)

    with (
        patch.object(exact, "as_starts", balance),
        patch.object(tracking, "as_starts", balance),
        patch.object(exact, "_capped", capped),
    ):
        yield


def quadratic(method: str, options: Mapping[str, Any], seed: int) -> float:
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


def embedded(overrides: Mapping[str, Any]) -> dict[str, float]:
    """The embedded default with other keys: exact match and loss at the end, and mean losses."""
    import tempfile

    import fedlora
    from fedlora.commands.console import quiet_libraries
    from fedlora.config.sources import layered
    from fedlora.config.yaml_file import read_yaml
    from fedlora.embedded import CONFIG
    from fedlora.runs.metrics_log import read_metrics

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        values = {"num_threads": 1, "eval_rounds": 0, "output_dir": f"{scratch}/run", **overrides}
        fedlora.run(fedlora.Config(**layered(read_yaml(CONFIG), values)))
        lines = read_metrics(f"{scratch}/run")
    last = [x["evaluation"] for x in lines if x.get("evaluation")][-1]
    rounds = [x["clients"] for x in lines if x["event"] == "round"]
    losses = [
        sum(c["weight"] * c["metrics"]["loss"] for c in clients if c["weight"])
        for clients in rounds
    ]
    return {
        "exact_match": last["exact_match"],
        "loss": last["loss"],
        "train_loss": sum(losses) / len(losses),
    }


def one(task: str, called: str, seed: int) -> dict[str, Any]:
    """One run; its line is appended to the file as soon as it is done."""
    way, began = STARTS[called], time.process_time()
    found: Mapping[str, float]
    with balanced_rows() if way.balanced else nullcontext():
        if task == "quad":
            found = {"loss": quadratic(way.method, way.options, seed)}
        else:
            found = embedded({**TASKS[task], **way.options, "method": way.method, "seed": seed})
    spent = time.process_time() - began
    line = {"task": task, "start": called, "seed": seed, **found, "cpu_seconds": round(spent, 1)}
    with FILE.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def kept() -> list[dict[str, Any]]:
    """Every run that is done."""
    return [json.loads(x) for x in FILE.read_text().splitlines()] if FILE.exists() else []


def tables(lines: Sequence[Mapping[str, Any]]) -> str:
    """A table for each task: every start, and its paired difference to the default."""
    out = [
        "# How a client of `exact` starts",
        "",
        f"`benchmarks/start_fraction.py`, {machine()}. Exact match in %, after the last round;",
        "loss on held-out rows after it (`quad`: relative to the start); training loss: the mean",
        "over rounds. Mean ± standard deviation over seeds; differences to `default` are over the",
        "seeds that both have, with 95% intervals (Student's t). Points of exact match: more is",
        "better; losses: less is better.",
    ]
    for task in [*TASKS, "quad"]:
        here = [x for x in lines if x["task"] == task]
        if not here:
            continue
        measures = ["loss"] if task == "quad" else ["exact_match", "loss", "train_loss"]
        named = [x.replace("_", " ") for x in measures]
        heads = ["start", "seeds", *(h for x in named for h in (x, "to default"))]
        out += ["", f"## {task}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for called in STARTS:
            own = [x for x in here if x["start"] == called]
            if own:
                seeds = " ".join(str(x) for x in sorted(line["seed"] for line in own))
                cells = [f"{called} | {seeds}", *(_cells(here, called, x) for x in measures)]
                out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def _cells(lines: Sequence[Mapping[str, Any]], called: str, measure: str) -> str:
    """Mean and spread of one measure, and its difference to the default."""
    from fedlora.commands.study.statistics import paired

    factor, digits = (100, 1) if measure == "exact_match" else (1, 3)

    def values(start: str) -> dict[int, float]:
        return {x["seed"]: factor * x[measure] for x in lines if x["start"] == start}

    mean, spread = mean_and_spread(list(values(called).values()))
    text = f"{mean:.{digits}f} ± {spread:.{digits}f}"
    x = None if called == "default" else paired(values(called), values("default"))
    if x is None:
        return f"{text} | -"
    if x.low is None or x.high is None:
        return f"{text} | {x.mean:+.{digits}f}"
    return f"{text} | {x.mean:+.{digits}f} [{x.low:+.{digits}f}, {x.high:+.{digits}f}]"


def main() -> None:
    """Make the runs that are wanted and not done, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS, "quad"], default=["quad"])
    parser.add_argument("--starts", nargs="*", choices=list(STARTS), default=["default"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22])
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    done = {(x["task"], x["start"], x["seed"]) for x in kept()}
    # Seed by seed, so that what is broken off has pairs.
    jobs = [
        (task, start, seed)
        for task, seed, start in product(arguments.tasks, arguments.seeds, arguments.starts)
        if (task, start, seed) not in done
    ]
    in_parallel(one, jobs, arguments.processes)
    write("starts.md", tables(kept()))


if __name__ == "__main__":
    main()
