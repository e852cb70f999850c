"""The server's time for a round of `exact`, early and late: it does not grow with the rounds.

    .venv/bin/python benchmarks/exact_rounds.py

Ten clients of ranks 64 32 16 16 8 8 4 4 4 4 (sum 160) on one module of 4096 x 4096, times 64 for
Llama-7B's q and v; one thread. Rounds 1 and 2 are played; rounds 10 and 50 begin with an S of as
many rounds and its leading directions. CPU seconds, so that other processes count little; medians
of three. `--wide` adds a module of 8192 x 28672. Two minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

from aggregate import RANKS, SQUARE, WIDE, _adapter, _held
from common import machine, write

MODULES, REPEATS = 64, 3
PARTS = ("plan", "fold", "commit")


def played(server: Any, seed: int) -> dict[str, float]:
    """One round; the server's CPU seconds, without the clients' own work."""
    from fedlora.federation.exchange import client_start
    from fedlora.federation.messages import ClientUpdate
    from fedlora.lowrank import LowRank

    spent = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, work: Any, *given: Any) -> Any:
        began = time.process_time()
        out = work(*given)
        spent[part] += time.process_time() - began
        return out

    sent = timed("plan", server.plan)
    for client, broadcast in sent.items():
        start = client_start(broadcast, server.agreement)
        ended = {}
        for name, x in start.adapter.items():
            step = _adapter(server.agreement.shapes[name], x.rank, 7919 * client + seed)
            ended[name] = LowRank(x.A + 0.1 * step.A, x.B + step.B)
        timed("fold", server.accept, ClientUpdate(client, broadcast.round, ended, 100))
    timed("commit", server.commit)
    return spent


def server_at(shape: tuple[int, int], round: int) -> Any:
    """A server about to plan this round."""
    from fedlora.federation.aggregators.mean import Mean
    from fedlora.federation.exchange import Agreement
    from fedlora.federation.participants import Federation
    from fedlora.federation.server import Server, initial_state
    from fedlora.methods import METHODS
    from fedlora.methods.exact import from_global
    from fedlora.methods.tracking import basis_size, leading_directions
    from fedlora.methods.values import ServerState

    rule = METHODS["exact"]
    agreement = Agreement(rule, rule.options(), {"layer": shape})
    federation = Federation(RANKS, [100] * len(RANKS), agreement)
    state = initial_state(federation)
    if round > 2:
        whole = _held(shape, round, 1)
        size = basis_size(from_global(max(RANKS), rule.options()), shape)
        directions = leading_directions(whole, size)
        state = ServerState(
            round - 1, {"layer": whole}, ranks=state.ranks, leading={"layer": directions}
        )
    server = Server(federation, state, Mean())
    if round == 2:
        played(server, 0)
    return server


def row(shape: tuple[int, int], round: int, first: float) -> tuple[str, float]:
    """A line of the table, and the seconds of the round."""
    from fedlora.federation.server import Server
    from fedlora.lowrank import LowRank

    server = server_at(shape, round)
    runs = []
    for seed in range(REPEATS):
        again = Server(server.federation, server.state, server.aggregator)
        runs.append(played(again, seed))
    spent = {part: median(run[part] for run in runs) for part in PARTS}
    total = median(sum(run.values()) for run in runs)
    whole = again.state.adapter["layer"]
    form = f"factors, rank {whole.rank}" if isinstance(whole, LowRank) else "a matrix"
    held = sum(x.nbytes for x in (whole, again.state.leading["layer"]))
    held += again.state.changes[again.state.round].nbytes
    m, n = shape
    parts = " | ".join(f"{spent[part]:.2f}" for part in PARTS)
    return (
        f"| {m} x {n} | {round} | {form} | {parts} | {total:.2f} | "
        f"{total / (first or total):.1f} | {MODULES * total:.0f} | {held / 2**20:.0f} |",
        total,
    )


def main() -> None:
    """Measure, write the table."""
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wide", action="store_true", help="one module of 8192 x 28672 too")
    shapes = [SQUARE, WIDE] if parser.parse_args().wide else [SQUARE]
    torch.set_num_threads(1)
    lines = [
        "# A round of `exact` at the server, early and late",
        "",
        f"`benchmarks/exact_rounds.py`, {machine()}; one thread, float32, CPU seconds,",
        f"medians of {REPEATS}. Ten clients of ranks {' '.join(map(str, RANKS))}.",
        "Rounds 10 and 50 begin with an S of as many rounds. Fold: ten updates.",
        "MiB: what the server holds of one module (S, its directions, the last change).",
        "",
        "| module | round | S after it | plan | fold | commit | s | x round 1 | s for 64 | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in shapes:
        first = 0.0
        for round in (1, 2, 10, 50):
            line, total = row(shape, round, first)
            first = first or total
            lines.append(line)
            print(line, flush=True)
    write("exact_rounds.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
