"""Computes the singular values of the global update that a run saved, layer by layer."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedlora.adapters.saved_adapter import load_adapter
from fedlora.errors import InputError
from fedlora.lowrank import LowRank, norm, refactor
from fedlora.runs.file_names import FINAL
from fedlora.threads import one_thread

KEPT = 64
"""Values shown of a layer, the largest first."""
EXACT_UP_TO = 384
"""Factors of a larger rank are not decomposed whole: their leading values are found instead."""
MOST_BYTES = 4_000_000_000
MOST_SECONDS = 60.0
_ROUND = re.compile(r"^round-(\d+)$")


@dataclass(frozen=True)
class Layer:
    """One target module's update.

    Args:
        name: of the module.
        values: its leading singular values, the largest first.
        rank: how many there are with more than rounding in them; None: not counted.
        norm: Frobenius norm of the update.
        energy_rank: the fewest values that hold 99 % of the squared norm; None: more than `KEPT`
            values found.
    """

    name: str
    values: tuple[float, ...]
    rank: int | None
    norm: float
    energy_rank: int | None


@dataclass(frozen=True)
class Spectrum:
    """What a run saved last.

    Args:
        source: "final" or "round-3"; "" where nothing could be read.
        layers: in the model's order.
        note: what is missing, or "".
    """

    source: str
    layers: tuple[Layer, ...]
    note: str


def read_spectrum(run: Path) -> Spectrum:
    """The spectrum of the newest global update of a run that can be read."""
    notes = []
    for path in _saved(run):
        try:
            size = sum(file.stat().st_size for file in path.glob("adapter_model.*"))
            if size > MOST_BYTES:
                notes.append(f"{path.name}: {size / 1e9:.1f} GB, too large to take apart here")
                continue
            deltas = load_adapter(path).deltas
        except (InputError, OSError) as error:
            notes.append(f"{path.name} cannot be used: {error}")
            continue
        layers, left = _layers(deltas)
        if left:
            notes.append(f"{left} layers left out: more than {MOST_SECONDS:.0f} s of computing")
        return Spectrum(path.name, layers, "; ".join(notes))
    if (run / FINAL).is_dir() and any((run / FINAL).glob("client-*")):
        notes.append("final/ holds one model for each client and no global one")
    return Spectrum("", (), "; ".join(notes) or "no global model is saved in this run")


def _saved(run: Path) -> list[Path]:
    """Directories with a global update, the newest first."""
    rounds = []
    for path in run.iterdir():
        match = _ROUND.match(path.name)
        if match and path.is_dir():
            rounds.append((int(match.group(1)), path))
    candidates = [run / FINAL, *(path for _, path in sorted(rounds, reverse=True))]
    return [path for path in candidates if (path / "adapter_config.json").is_file()]


def _layers(deltas: dict[str, LowRank]) -> tuple[tuple[Layer, ...], int]:
    """Every layer, and how many were left out when time was over."""
    out: list[Layer] = []
    end = time.monotonic() + MOST_SECONDS
    with one_thread():
        for name, delta in sorted(deltas.items(), key=lambda pair: _natural(pair[0])):
            if time.monotonic() > end:
                break
            out.append(_layer(name, delta))
    return tuple(out), len(deltas) - len(out)


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(x), "") if x.isdecimal() else (0, x) for x in name.split(".")]


def _layer(name: str, delta: LowRank) -> Layer:
    whole = min(delta.rank, *delta.shape) <= EXACT_UP_TO
    values = refactor(delta).B.double().norm(dim=0) if whole else _leading(delta)
    size = norm(delta)
    numbers = [float(x) for x in values]
    # Beyond this, a value is what rounding in float32 leaves of a zero.
    least = numbers[0] * max(delta.shape) * torch.finfo(torch.float32).eps if numbers else 0.0
    real = [x for x in numbers if x > least]
    reached, energy_rank = 0.0, None
    for i, value in enumerate(real):
        reached += value * value
        if reached >= 0.99 * size * size:
            energy_rank = i + 1
            break
    return Layer(name, tuple(real[:KEPT]), len(real) if whole else None, size, energy_rank)


def _leading(delta: LowRank, sweeps: int = 6) -> Tensor:
    """The largest singular values by subspace iteration: `dW` itself is never formed."""
    A, B = delta.A.float(), delta.B.float()
    random = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(A.shape[1], KEPT + 16, generator=random))[0]  # (n, KEPT + 16)
    for _ in range(sweeps):
        p = torch.linalg.qr(B @ (A @ q))[0]
        q = torch.linalg.qr(A.T @ (B.T @ p))[0]
    values: Tensor = torch.linalg.svdvals((B @ (A @ q)).double())
    return values[:KEPT]
