"""The notebooks under `examples/notebooks`, run from the first cell to the last."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest
import torch

from support.notebooks import cells_of, run_notebook
from support.paths import REPOSITORY

pytestmark = pytest.mark.slow

NOTEBOOKS = REPOSITORY / "examples" / "notebooks"


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory to write to, and no window for pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    matplotlib.use("agg")
    torch.set_num_threads(1)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_it_shows(path: Path) -> None:
    """What a run prints would go out of date, and differs from machine to machine."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["cells"][0]["source"][0].startswith("# ")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_links_between_notebooks(path: Path) -> None:
    text = "".join(line for cell in cells_of(path) for line in cell["source"])
    for target in [part.partition(")")[0] for part in text.split("](")[1:]]:
        assert (NOTEBOOKS / target).is_file(), target


def test_first_run(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_notebook(NOTEBOOKS / "first_run.ipynb")
    losses = [figures["loss"] for figures in names["result"].evaluations.values()]
    assert losses[-1] < losses[0]
    assert "round 3 is saved" in capsys.readouterr().out
    assert names["model"].peft_config["default"].r > 16


def test_your_data(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_notebook(NOTEBOOKS / "your_data.ipynb")
    assert names["last"]["exact_match"] >= 0.4
    said = capsys.readouterr().out
    assert "greetings that are right to the letter: " in said
    assert "hello eve" in said


def test_merge_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_notebook(NOTEBOOKS / "merge_adapters.ipynb")
    assert max(layer.error for layer in names["merged"].layers.values()) < 1e-5
    assert 0.01 < max(layer.error for layer in names["small"].layers.values()) < 1
    assert "hello ada" in capsys.readouterr().out


def test_read_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_notebook(NOTEBOOKS / "read_a_report.ipynb")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    lines = [line for line in capsys.readouterr().out.splitlines() if "aggregation error" in line]
    errors = {line.split()[0]: float(line.split()[-1]) for line in lines[-2:]}
    assert errors["exact"] < 1e-5 < errors["zero_pad"]
