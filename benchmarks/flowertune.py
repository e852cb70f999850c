"""What FlowerTune's challenges would transfer, by the rule that adds the adapters up.

    .venv/bin/python benchmarks/flowertune.py

A server of fedlora counts the bytes of all 200 rounds with the clients that take part in each; the
updates are random. Mistral-7B's q and v projections and the ranks are made eight times smaller,
which makes all that is counted, `r (m + n)` of factors and `m n` of whole matrices, exactly 64
times smaller; it is multiplied back, and by the 32 layers. The leaderboard allows 200,000 MiB.
Some two minutes.
"""

from __future__ import annotations

from typing import Any

from common import write

CHALLENGES = {"general NLP, medical": (20, 0.1), "finance": (50, 0.1), "code": (10, 0.2)}
"""Name -> clients, and the share of them in each round."""

SHRUNK, LAYERS, ROUNDS, LIMIT = 8, 32, 200, 200_000
SHAPES = {"q": (4096 // SHRUNK, 4096 // SHRUNK), "v": (1024 // SHRUNK, 4096 // SHRUNK)}
RANKS = {"32": [32], "64, 32, 16, 8": [64, 32, 16, 8]}
RULES: tuple[tuple[str, int | None], ...] = (
    ("fedit", None), ("ffa", None), ("exact", 32), ("exact", 64), ("exact", None), ("flora", None),
)  # fmt: skip


def traffic(method: str, max_rank: int | None, ranks: list[int], share: float) -> tuple[int, int]:
    """Bytes up and down of the challenge."""
    import torch

    from fedlora.federation.aggregators.mean import Mean
    from fedlora.federation.exchange import Agreement
    from fedlora.federation.participants import Federation
    from fedlora.federation.server import Server, initial_state
    from fedlora.methods import METHODS
    from fedlora.runs.planning.simulated_traffic import moved_update

    rule = METHODS[method]
    options: dict[str, Any] = {"max_rank": max_rank // SHRUNK} if max_rank else {}
    agreement = Agreement(rule, rule.options(**options), SHAPES)
    small = [rank // SHRUNK for rank in ranks]
    federation = Federation(small, [100] * len(ranks), agreement, clients_per_round=share)
    server = Server(federation, initial_state(federation), Mean())
    generator = torch.Generator().manual_seed(0)
    up = down = 0
    for _ in range(ROUNDS):
        for sent in server.plan().values():
            server.accept(moved_update(server, sent, generator))
        record = server.commit()
        up, down = up + record.bytes_up, down + record.bytes_down
    return up * SHRUNK**2 * LAYERS, down * SHRUNK**2 * LAYERS


def main() -> None:
    """Count, write the table."""
    import torch

    from fedlora.methods import METHODS

    torch.set_num_threads(1)
    lines = [
        "# What FlowerTune's challenges would transfer",
        "",
        "`benchmarks/flowertune.py`; Mistral-7B, q and v, float32, 200 rounds; MiB of all clients",
        f"together, as FlowerTune counts them. Its leaderboard allows {LIMIT:,}.",
        "",
        "| challenge | ranks | method | max_rank | up | down | together | allowed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for challenge, (number, share) in CHALLENGES.items():
        for called, kinds in RANKS.items():
            for method, max_rank in RULES:
                if len(kinds) > 1 and not METHODS[method].mixed_ranks:
                    continue
                ranks = [kinds[client % len(kinds)] for client in range(number)]
                up, down = (x / 2**20 for x in traffic(method, max_rank, ranks, share))
                verdict = "yes" if up + down <= LIMIT else "no"
                lines.append(
                    f"| {challenge} | {called} | `{method}` | {max_rank or '-'} | {up:,.0f} | "
                    f"{down:,.0f} | {up + down:,.0f} | {verdict} |"
                )
                print(lines[-1], flush=True)
    write("flowertune.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
