"""What a run needs is looked at, a line for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from fedlora.commands.doctor import checks
from fedlora.commands.doctor.checks import (
    OK,
    PROBLEM,
    WARNING,
    Check,
    Machine,
    cores,
    examine,
    memory,
    shortfall,
)

PROBED: dict[str, dict[str, Any]] = {
    "torch": {"threads": 1, "cuda_build": None, "hip_build": None},
    "cuda": {"there": False},
    "mps": {"there": False},
    "hub": {},
    "transformers": {},
    "peft": {},
    "datasets": {},
}


@pytest.fixture(autouse=True)
def _no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)


def looked(name: str, output_dir: Path, **probed: Mapping[str, Any]) -> Check:
    """One of the lines."""
    machine = Machine(output_dir, {**PROBED, **probed})
    return next(check for check in examine(machine) if check.name == name)


def test_versions_that_are_missing_or_do_not_fit() -> None:
    assert shortfall(Requirement("pytest>=1")) is None
    assert shortfall(Requirement("no-such-package-here")) == "not installed"
    wrong = shortfall(Requirement("pytest<1"))
    assert wrong is not None
    assert wrong.endswith(", not <1")


def test_a_library_that_does_not_work_is_a_problem_with_its_remedy(tmp_path: Path) -> None:
    check = looked("peft", tmp_path, peft={"error": "ImportError: no"})
    assert check.state == PROBLEM
    assert "does not work: ImportError: no" in check.found
    assert check.remedy.startswith("pip install --force-reinstall 'peft")
    broken = {"error": "OSError: libc"}
    after = looked("peft", tmp_path, torch=broken, peft=broken)
    assert after.remedy == "mend torch first"


def test_the_device(tmp_path: Path) -> None:
    assert looked("device", tmp_path).found == "CPU"
    gpu = {"there": True, "device": "A", "devices": 2, "free": 2**33, "total": 2**34}
    check = looked("device", tmp_path, cuda=gpu)
    assert (check.state, check.found) == (OK, "A, the first of 2, 8.0 GiB of 16.0 GiB free")
    full = looked("device", tmp_path, cuda={**gpu, "free": 2**30})
    assert full.state == WARNING
    assert looked("device", tmp_path, cuda={"error": "no driver"}).state == PROBLEM
    built = looked("device", tmp_path, torch={**PROBED["torch"], "cuda_build": "12"})
    assert built.state == WARNING
    assert "built for a GPU, and finds none" in built.found


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    assert looked("output", tmp_path / "new" / "run").found.startswith(f"{tmp_path}/new/run, ")
    (tmp_path / "file").write_text("")
    check = looked("output", tmp_path / "file" / "run")
    assert check.state == PROBLEM
    assert "cannot be written" in check.found
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]  # nothing is left behind


def test_more_threads_than_cores(tmp_path: Path) -> None:
    check = looked("cores", tmp_path, torch={**PROBED["torch"], "threads": 10_000})
    assert check.state == WARNING
    assert "--num_threads" in check.remedy
    assert cores() > 0
    sizes = memory()
    assert sizes is not None
    assert 0 <= sizes[0] <= sizes[1]


def test_a_check_that_fails_is_a_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def _odd(machine: Machine) -> Iterator[Check]:
        raise RuntimeError("oh")

    monkeypatch.setattr(checks, "CHECKS", (_odd,))
    assert examine(Machine(tmp_path, PROBED)) == [
        Check("odd", WARNING, "could not be looked at: oh", "report this")
    ]
