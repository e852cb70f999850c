"""Looking before running, through the installed script: nothing but the view is written."""

from __future__ import annotations

from pathlib import Path

from support.rows import rows
from support.script import (
    run_in_turn,
    run_script,
)
from support.views import (
    _offline,  # noqa: F401
    _signals_as_they_were,  # noqa: F401
    bars_of,
    files,
    here,  # noqa: F401
    table_of,
)


def test_a_pipe_has_no_colours(here: Path) -> None:
    done = run_script("partition", "my.yaml", "--by", "kind", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert bars_of(done.stdout)


def test_data_are_shown_without_noise(here: Path) -> None:
    """No progress bars of libraries on standard error; a damaged file is one line."""
    from datasets import Dataset

    (here / "data").mkdir()
    (here / "all.jsonl").rename(here / "data" / "train.jsonl")
    Dataset.from_list(rows(12)).to_parquet(str(here / "x.parquet"))
    (here / "damaged.parquet").write_bytes((here / "x.parquet").read_bytes()[:-9])
    data_set, parquet, damaged = run_in_turn(
        "partition --dataset_name data --num_clients 3",
        "partition --train_file x.parquet --num_clients 3",
        "partition --train_file damaged.parquet --num_clients 3",
        cwd=here,
    )
    assert (data_set.returncode, data_set.stderr) == (0, "")
    assert [cells[2] for cells in table_of(data_set.stdout)[1]] == ["20", "20", "20"]
    assert (parquet.returncode, parquet.stderr) == (0, "")
    assert (damaged.returncode, damaged.stdout) == (2, "")
    assert damaged.stderr.startswith("fedlora: train_file: ")
    assert damaged.stderr.count("\n") == 1


def test_bad_input_through_the_installed_script(here: Path) -> None:
    before = files(here)
    lines = ("partition my.yaml --by topic", "data my.yaml --show x")
    answers = [
        run_script("run", "my.yaml", "--dry_run", "--lora_r", "0", cwd=here),
        *run_in_turn(*lines, cwd=here),
    ]
    for done in answers:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("fedlora: ")
        assert done.stderr.count("\n") == 1
    assert files(here) == before
