"""From 10 to 10,000 clients: seconds per client and the server's memory.

    .venv/bin/python benchmarks/scale.py

Ready-made updates of ranks 4 to 64 go through the server; no model is trained. The modules are q
and v of a small Llama. One thread, one process a case; a few minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, write
from measured import in_own_process, resident

LAYERS, WIDTH = 6, 256
RANKS = [4, 8, 16, 32, 64]
DIFFERENT = 16  # updates of each rank
CLIENTS = [10, 100, 1_000, 10_000]


def server_rounds(
    clients: int, asked: int | None, rounds: int, backwards: bool, method: str
) -> dict[str, Any]:
    """Some rounds of a server; `backwards`: the last client answers first, and a spool is used."""
    import torch

    from fedlora.federation.aggregators.mean import Mean
    from fedlora.federation.exchange import Agreement
    from fedlora.federation.messages import ClientUpdate
    from fedlora.federation.participants import Federation
    from fedlora.federation.server import Server, initial_state
    from fedlora.lowrank import LowRank
    from fedlora.methods import METHODS

    torch.set_num_threads(1)
    shapes = {f"layers.{i}.{p}": (WIDTH, WIDTH) for i in range(LAYERS) for p in ("q", "v")}
    g = torch.Generator().manual_seed(0)
    ready = [
        {
            name: LowRank(
                torch.randn(r, n, generator=g) / n**0.5, 0.01 * torch.randn(m, r, generator=g)
            )
            for name, (m, n) in shapes.items()
        }
        for _ in range(DIFFERENT)
        for r in RANKS
    ]
    before = resident("VmRSS")
    rule = METHODS[method]
    ranks = [RANKS[k % len(RANKS)] for k in range(clients)]
    agreement = Agreement(rule, rule.options(), shapes)
    federation = Federation(ranks, [100 + k % 7 for k in range(clients)], agreement, asked)
    answers, began = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        spool = Path(scratch) / "spool" if backwards else None
        state = initial_state(federation)
        server = Server(federation, state, Mean(), spool)
        for _ in range(rounds):
            sent = server.plan()
            for k in reversed(sent) if backwards else sent:
                update = ready[k % len(ready)]  # of the rank of client k
                server.accept(ClientUpdate(k, sent[k].round, update, 100 + k % 7))
            answers += len(sent)
            server.commit()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "answers": answers, "memory": resident() - before}


def main() -> None:
    """Measure all, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case")
    parser.add_argument("--arguments", default="{}")
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(server_rounds(**json.loads(chosen.arguments))))
        return
    lines = []
    for asked, backwards in ((10, False), (None, False), (None, True)):
        for clients in CLIENTS:
            if backwards and clients > 1_000:
                continue
            rounds = 10 if asked or clients <= 100 else 3 if clients <= 1_000 else 1
            case = {"clients": clients, "asked": asked, "rounds": rounds}
            case |= {"backwards": backwards, "method": "exact"}
            found = in_own_process(__file__, "rounds", case)
            each = 1e3 * found["seconds"] / found["answers"]
            how = "last first, spooled" if backwards else "in client order"
            lines.append(
                f"| {clients:,} | {asked or 'all'} | {how} | {rounds} | {each:.1f} | "
                f"{found['memory']:.0f} |"
            )
            print(lines[-1], flush=True)
    matrices = 2 * LAYERS * WIDTH * WIDTH * 4 / 2**20
    text = [
        "# From 10 to 10,000 clients",
        "",
        f"`benchmarks/scale.py`, {machine()}; one thread, float32, one process a row.",
        f"`exact`, {2 * LAYERS} modules of {WIDTH} x {WIDTH} ({matrices:.0f} MiB as matrices),",
        f"ranks {' '.join(map(str, RANKS))} by turns; ready-made updates, nothing is trained.",
        "Time: plan, accept and commit, by client that answered; memory: the peak beyond the",
        "libraries and the ready-made updates.",
        "",
        "| clients | asked per round | arrival | rounds | ms per client | MiB |",
        "|---|---|---|---|---|---|",
        *lines,
    ]
    write("scale.md", "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
