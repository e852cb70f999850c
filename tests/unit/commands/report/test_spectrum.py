"""Singular values of the global update, against a dense decomposition in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.adapters.saved_adapter import write_adapter
from fedlora.commands.report import spectrum as module
from fedlora.commands.report.spectrum import read_spectrum
from support.adapters import random_lowrank
from support.report_runs import targets_of
from support.simulated import matrix

SHAPES = {"layers.10.q": (20, 15), "layers.9.q": (20, 15)}


def saved(path: Path, rank: int = 6) -> Path:
    """A run's final adapter."""
    updates = {
        name: random_lowrank(shape, rank, i) for i, (name, shape) in enumerate(SHAPES.items())
    }
    write_adapter(path / "final", updates, targets_of(SHAPES))
    return path


def test_values_rank_norm_and_energy(tmp_path: Path) -> None:
    spectrum = read_spectrum(saved(tmp_path))
    assert (spectrum.source, spectrum.note) == ("final", "")
    assert [layer.name for layer in spectrum.layers] == ["layers.9.q", "layers.10.q"]
    exact = torch.linalg.svdvals(matrix(random_lowrank((20, 15), 6, 1)))
    layer = spectrum.layers[0]
    assert layer.values == pytest.approx(exact[:6].tolist(), rel=1e-4)
    assert layer.rank == 6
    assert layer.norm == pytest.approx(float(exact.norm()), rel=1e-5)
    energy = (exact**2).cumsum(0) / (exact**2).sum()
    assert layer.energy_rank == int((energy < 0.99).sum()) + 1


def test_leading_values_of_large_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_UP_TO", 4)
    layer = read_spectrum(saved(tmp_path)).layers[0]
    exact = torch.linalg.svdvals(matrix(random_lowrank((20, 15), 6, 1)))
    assert layer.values[:6] == pytest.approx(exact[:6].tolist(), rel=1e-3)
    assert layer.rank is None  # not counted


def test_the_newest_round_where_nothing_is_final(tmp_path: Path) -> None:
    run = saved(tmp_path)
    (run / "final").rename(run / "round-2")
    (run / "round-10").mkdir()  # without an adapter
    assert read_spectrum(run).source == "round-2"


def test_why_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_spectrum(tmp_path).note == "no global model is saved in this run"
    run = saved(tmp_path)
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    assert "too large to take apart here" in read_spectrum(run).note
    (run / "final").rename(run / "client-0")
    (run / "final").mkdir()
    (run / "client-0").rename(run / "final" / "client-0")
    assert read_spectrum(run).note == "final/ holds one model for each client and no global one"
