"""Aggregation at the size of large models: ours, a dense SVD, PEFT's; time and memory.

    .venv/bin/python benchmarks/aggregate.py

Ten clients of ranks 64 32 16 16 8 8 4 4 4 4 (sum 160), Llama-7B's q and v: 64 modules of
4096 x 4096; and one module of 8192 x 28672. One thread, one process a case. About five minutes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from common import machine, write
from measured import in_own_process, limits, resident, seconds_of

RANKS = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
MODULES = 64
SQUARE, WIDE = (4096, 4096), (8192, 28672)


# --- cases; each returns seconds and what its limits are reckoned from ---


def _adapter(shape: tuple[int, int], rank: int, seed: int) -> Any:
    """Factors whose directions fall off, as trained ones do."""
    import torch

    from fedlora.lowrank import LowRank

    (m, n), g = shape, torch.Generator().manual_seed(seed)
    fall = torch.arange(1, rank + 1).float() ** -0.7
    return LowRank(
        torch.randn(rank, n, generator=g) / n**0.5,
        0.01 * fall * torch.randn(m, rank, generator=g) / m**0.5,
    )


def _held(shape: tuple[int, int], round: int, seed: int) -> Any:
    """The sum S before a round as `exact` holds it: what such clients have learnt before.

    Rounds share eight directions, so that S has leading ones; all others are drawn anew.
    """
    import torch

    from fedlora.lowrank import Dense, LowRank, concat, drop_null_directions, merge_equal_rows

    common = _adapter(shape, 8, seed)
    m, n = shape
    whole, terms = torch.zeros(m, n), []
    for number in range(1, round):
        x = _adapter(shape, sum(RANKS), 1000 * seed + number)
        x = LowRank(x.A, x.B + 0)
        x.A[:8] += 0.7 * common.A
        x.B[:, :8] += 0.7 * common.B
        if sum(RANKS) * (round - 1) * (m + n) > m * n:
            whole.addmm_(x.B, x.A)
        else:
            terms.append(x)
    return drop_null_directions(merge_equal_rows(concat(terms))) if terms else Dense(whole)


def a_round(method: str, round: int, modules: int, shape: list[int]) -> dict[str, Any]:
    """One round of the server: plan, ten updates, commit. The clients' own work is not counted."""
    import torch

    from fedlora.federation.aggregators.mean import Mean
    from fedlora.federation.exchange import Agreement, client_start
    from fedlora.federation.messages import ClientUpdate
    from fedlora.federation.participants import Federation
    from fedlora.federation.server import Server, initial_state
    from fedlora.lowrank import LowRank
    from fedlora.methods import METHODS
    from fedlora.methods.exact import from_global
    from fedlora.methods.tracking import basis_size, leading_directions
    from fedlora.methods.values import ServerState

    m, n = shape
    shapes = {f"layer{i}": (m, n) for i in range(modules)}
    rule = METHODS[method]
    agreement = Agreement(rule, rule.options(), shapes)
    federation = Federation(RANKS, [100] * len(RANKS), agreement)
    state = initial_state(federation)
    if round > 1:
        held = {name: _held((m, n), round, i + 1) for i, name in enumerate(shapes)}
        size = basis_size(from_global(max(RANKS), agreement.options), (m, n))
        leading = {name: leading_directions(x, size) for name, x in held.items()}
        state = ServerState(round - 1, held, ranks=state.ranks, leading=leading)
    server = Server(federation, state, Mean())
    del state
    sent: dict[int, Any] = {}
    spent = {"plan": seconds_of(lambda: sent.update(server.plan())), "fold": 0.0}
    for k, broadcast in sent.items():
        start = client_start(broadcast, agreement)
        ended = {}
        for i, (name, x) in enumerate(start.adapter.items()):
            step = _adapter((m, n), x.rank, 7919 * k + i)
            ended[name] = LowRank(x.A + 0.1 * step.A, x.B + step.B)
        update = ClientUpdate(k, round, ended, 100)
        spent["fold"] += seconds_of(lambda u=update: server.accept(u))  # type: ignore[misc]
        del start, ended, update
    spent["commit"] = seconds_of(server.commit)
    held_now = next(iter({**server.state.base_delta, **server.state.adapter}.values()))
    return {
        "seconds": sum(spent.values()),
        "parts": spent,
        "modules": modules,
        "rank": held_now.rank if isinstance(held_now, LowRank) else None,
        "threads": torch.get_num_threads(),
    }


def refactoring(rank: int, shape: list[int]) -> dict[str, Any]:
    """Two thin QRs and a small SVD of one stack."""
    from fedlora.lowrank import refactor

    x = _adapter((shape[0], shape[1]), rank, 1)
    refactor(x)
    return {"seconds": min(seconds_of(lambda: refactor(x)) for _ in range(3)), "modules": 1}


def directions(shape: list[int], whole: bool, round: int = 50) -> dict[str, Any]:
    """The leading 48 directions of a dense S: refreshed, or by decomposing all of it."""
    from fedlora.lowrank import leading, prefix, refactor

    x = _held((shape[0], shape[1]), round, 1)
    used = 48
    work = (lambda: prefix(refactor(x), used)) if whole else (lambda: leading(x, used))
    return {"seconds": seconds_of(work), "modules": 1}


def dense_svd(shape: list[int]) -> dict[str, Any]:
    """FlexLoRA as its code does it: the products as matrices, and a whole SVD."""
    import torch

    parts = [_adapter((shape[0], shape[1]), rank, k) for k, rank in enumerate(RANKS)]

    def work() -> None:
        total = torch.zeros(shape)
        for x in parts:
            total += 0.1 * (x.B @ x.A)
        torch.linalg.svd(total, full_matrices=False)

    return {"seconds": seconds_of(work), "modules": 1}


def peft(kind: str, modules: int, shape: list[int]) -> dict[str, Any]:
    """PEFT's `add_weighted_adapter`; `svd` to rank 64, thin factors."""
    import torch
    from peft import LoraConfig, get_peft_model

    m, n = shape
    layers = torch.nn.ModuleDict(
        {f"layer{i}": torch.nn.Linear(n, m, False) for i in range(modules)}
    )
    names = [f"client{k}" for k in range(len(RANKS))]
    model: Any = None
    for k, (name, rank) in enumerate(zip(names, RANKS, strict=True)):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
        if model is None:
            model = get_peft_model(layers, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for i, layer in enumerate(model.base_model.model.values()):
            x = _adapter((m, n), rank, 7919 * k + i)
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = x.A, x.B
    how: dict[str, Any] = {"combination_type": kind}
    if kind == "svd":
        how |= {"svd_rank": max(RANKS), "svd_full_matrices": False}

    def work() -> None:
        with torch.no_grad():
            model.base_model.add_weighted_adapter(names, [0.1] * len(names), "sum", **how)

    return {"seconds": seconds_of(work), "modules": modules}


CASES = {f.__name__: f for f in (a_round, refactoring, directions, dense_svd, peft)}


def measure(case: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """One case, with this machine's limits and what memory it took beyond the libraries."""
    import torch

    import fedlora.federation  # noqa: F401

    if case == "peft":
        import peft as library  # noqa: F401
    torch.set_num_threads(1)
    before = resident("VmRSS")
    out = CASES[case](**arguments)
    memory = resident() - before
    return {**out, "limits": limits(), "memory": memory}


# --- the table ---


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        title: what is measured.
        case: the function.
        arguments: its arguments.
        rank: the rank of the stack that is decomposed, for the GEMM limit; 0 = nothing is.
        dense: a whole SVD.
    """

    title: str
    case: str
    arguments: dict[str, Any]
    rank: int = 0
    dense: bool = False


def rows() -> list[Row]:
    """All cases, largest memory about 4 GiB."""
    s, w = list(SQUARE), list(WIDE)

    def ours(method: str, round: int, modules: int, shape: list[int]) -> dict[str, Any]:
        return {"method": method, "round": round, "modules": modules, "shape": shape}

    out = [
        Row("`flora`, any round", "a_round", ours("flora", 1, MODULES, s)),
        Row("`exact`, round 1", "a_round", ours("exact", 1, MODULES, s), 160),
        Row("`exact`, round 10 (factors)", "a_round", ours("exact", 10, 2, s), 1600),
        Row("`exact`, round 50 (dense)", "a_round", ours("exact", 50, 4, s)),
        Row("PEFT `cat`", "peft", {"kind": "cat", "modules": 8, "shape": s}),
        Row("PEFT `svd`", "peft", {"kind": "svd", "modules": 1, "shape": s}, dense=True),
        Row("dense SVD (FlexLoRA's code)", "dense_svd", {"shape": s}, dense=True),
        Row("`flora`", "a_round", ours("flora", 1, 1, w)),
        Row("`exact`, round 1", "a_round", ours("exact", 1, 1, w), 160),
        Row("PEFT `cat`", "peft", {"kind": "cat", "modules": 1, "shape": w}),
    ]
    out += [
        Row(f"refactoring, rank {r}", "refactoring", {"rank": r, "shape": s}, r)
        for r in (160, 320, 800)
    ]
    for n in (1024, 4096):
        for whole in (False, True):
            title = f"48 directions of dense S, {n} x {n}, {'whole SVD' if whole else 'refreshed'}"
            arguments = {"shape": [n, n], "whole": whole}
            out.append(Row(title, "directions", arguments, dense=whole))
    return out


def line(row: Row, found: dict[str, Any]) -> str:
    """A row of the table, with its limits."""
    (m, n), modules = row.arguments["shape"], found["modules"]
    one = found["seconds"] / modules
    copied = 2 * 4 * sum(RANKS) * (m + n) / (found["limits"]["copy"] * 1e9)
    flops = 0.0
    if row.rank:  # two QRs with their Q, the core's SVD, two products
        flops = (m + n) * row.rank**2 * (4 + 2) + 22.0 * row.rank**3
    if row.dense:
        flops = 6.0 * m * n * min(m, n) + 20.0 * min(m, n) ** 3
    gemm = f"{one / (flops / (found['limits']['gemm'] * 1e9)):.1f}" if flops else "-"
    copies = f"{one / copied:.0f}" if row.case in ("a_round", "peft", "dense_svd") else "-"
    whole = "-"
    if (m, n) == SQUARE and row.case in ("a_round", "peft", "dense_svd"):
        scaled = "" if modules == MODULES else " (scaled)"
        whole = f"{one * MODULES:.3g}{scaled}"
    return (
        f"| {row.title} | {m} x {n} | {modules} | {one:.3g} | {whole} | {found['memory']:.0f} | "
        f"{copies} | {gemm} |"
    )


def main() -> None:
    """Measure all, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case")
    parser.add_argument("--arguments", default="{}")
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(measure(chosen.case, json.loads(chosen.arguments))))
        return
    lines, parts, svd = [], [], 0.0
    for row in rows():
        found = in_own_process(__file__, row.case, row.arguments)
        lines.append(line(row, found))
        print(lines[-1], flush=True)
        if row.case == "dense_svd":
            svd = found["seconds"]
        if "parts" in found:
            each = ", ".join(f"{k} {v:.2f} s" for k, v in found["parts"].items())
            shape = " x ".join(map(str, row.arguments["shape"]))
            held = f"rank {found['rank']}" if found["rank"] else "dense"
            parts.append(f"- {row.title}, {found['modules']} of {shape}: {each}; then {held}")
    m, n = sorted(WIDE)
    lines.append(
        f"| dense SVD (scaled from the square by m^2 n) | {WIDE[0]} x {WIDE[1]} | 0 | "
        f"{svd * m * m * n / SQUARE[0] ** 3:.3g} | - | - | - | - |"
    )
    text = [
        "# Aggregation at the size of large models",
        "",
        f"`benchmarks/aggregate.py`, {machine()}; one thread, float32, one process a row.",
        "Ten clients of ranks 64 32 16 16 8 8 4 4 4 4. Memory: MiB at the peak beyond the",
        "libraries, inputs included. x copy: times what copying the clients' factors once takes;",
        "x GEMM: times what the operations of the decomposition take at the speed of a matrix",
        "product (6 (m + n) R^2 + 22 R^3 for a stack of rank R; 6 m n k + 20 k^3 for a whole SVD,",
        "k = min(m, n)). 64 modules: measured, or scaled from fewer.",
        "",
        "| what | module | modules measured | s per module | s for 64 | MiB | x copy | x GEMM |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
        "",
        "S before rounds 10 and 50 is simulated: what such clients have learnt in the rounds",
        "before, eight directions common to all rounds, the others drawn anew; as factors of rank",
        "1440, and dense. `flora`'s row holds for every round while what was merged is held as",
        "factors, which are only appended to.",
        "",
        "The parts of a round:",
        "",
        *parts,
    ]
    write("aggregate.md", "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
