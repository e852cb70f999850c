"""Looking before running, through the installed script: nothing but the view is written."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from support.rows import rows
from support.script import run_script
from support.views import _offline, _signals_as_they_were, bars_of, files, here, table_of  # noqa: F401


def test_a_pipe_has_no_colours(here: Path) -> None:
    done = run_script("partition", "my.yaml", "--by", "kind", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert bars_of(done.stdout)


def test_a_data_set_is_shown_without_noise(here: Path) -> None:
    """No progress bars of libraries on standard error."""
    (here / "data").mkdir()
    (here / "all.jsonl").rename(here / "data" / "train.jsonl")
    done = run_script("partition", "--dataset_name", "data", "--num_clients", "3", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert [cells[2] for cells in table_of(done.stdout)[1]] == ["20", "20", "20"]


def test_a_parquet_file_is_shown_without_noise(here: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(rows(12)).to_parquet(str(here / "x.parquet"))
    done = run_script("partition", "--train_file", "x.parquet", "--num_clients", "3", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    (here / "x.parquet").write_bytes((here / "x.parquet").read_bytes()[:-9])
    done = run_script("partition", "--train_file", "x.parquet", "--num_clients", "3", cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fedlora: train_file: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    ["partition my.yaml --by topic", "data my.yaml --show x", "run my.yaml --dry_run --lora_r 0"],
)
def test_bad_input_through_the_installed_script(line: str, here: Path) -> None:
    before = files(here)
    done = run_script(*shlex.split(line), cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fedlora: ")
    assert done.stderr.count("\n") == 1
    assert files(here) == before
