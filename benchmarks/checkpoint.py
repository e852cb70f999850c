"""What saving a round costs: the server's state written whole, or as what the round has changed.

    python benchmarks/savings.py --checkpoint   # two minutes and 4 GB of disk

Simulated clients: at the shapes of all linear layers of a Llama of 110 M parameters from round 2 on
(one layer, times 12), at Llama-7B's q and v from round 11 on (two modules, times 32). Means over
eleven rounds, in one of which at least the state is written whole. Bytes are those of files that
are new on the disk; CPU seconds, one thread, with the checks of what was written, without waiting
for the disk.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from aggregate import RANKS, _held
from common import machine
from exact_rounds import played

ROUNDS = 11
LLAMA_110M = [*[(768, 768)] * 4, (2048, 768), (2048, 768), (768, 2048)]
# Name -> shapes of the modules, by how much the figures are multiplied, the first round.
CASES = {
    "110 M, all linear layers": (LLAMA_110M, 12, 1),
    "7B, q and v": ([(4096, 4096)] * 2, 32, 10),
}
WAYS = ("whole", "changes", "adapter")


def measure(
    shapes: list[tuple[int, int]], times: int, first: int
) -> dict[str, tuple[float, float]]:
    """Way of saving -> MB written and CPU seconds a round, and those of the round's adapter."""
    import torch

    from fedlora.adapters.saved_adapter import write_adapter
    from fedlora.model.targets import Targets
    from fedlora.runs.directory import RunDirectory
    from fedlora.runs.state_file import settled

    torch.set_num_threads(1)
    server = _server({f"layer.{k}": shape for k, shape in enumerate(shapes)}, first)
    targets = Targets(dict(server.agreement.shapes), ["layer"], False, "")
    spent = {way: [0.0, 0.0] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        runs = {way: RunDirectory.create(Path(scratch) / way, "") for way in WAYS[:2]}
        for number in range(first, first + ROUNDS + 1):
            played(server, number)
            server.state = settled(server.state)
            for way, run in runs.items():
                if way == "whole":
                    shutil.rmtree(run.path / f"round-{number - 1}", ignore_errors=True)
                began = time.process_time()
                saved = run.save_round({}, targets, server.state, {}, {})
                seconds = time.process_time() - began
                if number > first:  # the first one is whole in any case
                    _add(spent[way], _new_bytes(saved / "state"), seconds)
                run.prune(2, None)
            began = time.process_time()
            write_adapter(Path(scratch) / "adapter", server.state.adapter, targets)
            if number > first:
                seconds = time.process_time() - began
                _add(spent["adapter"], _new_bytes(Path(scratch) / "adapter"), seconds)
    return {
        way: (times * total / ROUNDS / 1e6, times * seconds / ROUNDS)
        for way, (total, seconds) in spent.items()
    }


def _add(sums: list[float], size: float, seconds: float) -> None:
    sums[0] += size
    sums[1] += seconds


def _new_bytes(directory: Path) -> int:
    """Bytes of the files that are in no other directory."""
    stats = [path.stat() for path in directory.iterdir() if path.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def _server(shapes: dict[str, tuple[int, int]], first: int) -> Any:
    """A server about to plan round `first`."""
    from fedlora.federation.aggregators.mean import Mean
    from fedlora.federation.exchange import Agreement
    from fedlora.federation.participants import Federation
    from fedlora.federation.server import Server, initial_state
    from fedlora.methods import METHODS
    from fedlora.methods.exact import from_global
    from fedlora.methods.tracking import basis_size, leading_directions

    rule = METHODS["exact"]
    agreement = Agreement(rule, rule.options(), shapes)
    federation = Federation(RANKS, [100] * len(RANKS), agreement)
    state = initial_state(federation)
    if first > 1:
        used = from_global(max(RANKS), rule.options())
        held = {name: _held(shape, first, k) for k, (name, shape) in enumerate(shapes.items())}
        leading = {
            name: leading_directions(x, basis_size(used, shapes[name])) for name, x in held.items()
        }
        state = replace(state, round=first - 1, adapter=held, leading=leading)
    return Server(federation, state, Mean())


def table() -> str:
    """The table of all cases, in Markdown."""
    words = {
        "whole": "the server's state whole in every round",
        "changes": "the state as what rounds have changed",
        "adapter": "the PEFT adapter beside it (save_adapter_rounds: 1)",
    }
    how = (__doc__ or "").strip().split("\n\n")[-1]
    lines = [
        "# What saving a round costs",
        "",
        f"`benchmarks/savings.py --checkpoint`, {machine()}; rule `exact`, ten clients of ranks",
        f"{' '.join(map(str, RANKS))} (sum {sum(RANKS)}). {how}",
        "",
        "| | MB a round | CPU s a round | MB to the first line |",
        "|---|---|---|---|",
    ]
    for name, (shapes, times, first) in CASES.items():
        found = measure(shapes, times, first)
        for way in WAYS:
            (size, seconds), ratio = found[way], found[way][0] / found["whole"][0]
            lines.append(f"| {name}: {words[way]} | {size:,.0f} | {seconds:.2f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"
