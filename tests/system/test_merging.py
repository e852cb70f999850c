"""`fedlora aggregate` in a process: how much memory it takes, and the table it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora import aggregate, load_adapter
from support.merging import deep  # noqa: F401


@pytest.mark.slow
def test_the_process_stays_small(tmp_path: Path) -> None:
    """What the operating system says, for 16384 x 16384 (1 GiB) and ranks 4 and 8."""
    script = """if True:
        import resource, sys, torch
        from fedlora import aggregate, load_adapter, save_adapter
        from fedlora.adapters.saved_adapter import SavedAdapter
        from fedlora.lowrank import LowRank
        torch.set_num_threads(1)
        n = 16384
        def make(path, r, n):
            deltas = {"a": LowRank(torch.randn(r, n), torch.randn(n, r))}
            save_adapter(path, SavedAdapter(deltas, {}, {"target_modules": ["a"]}))
        def run(out, *paths):
            save_adapter(out, aggregate([load_adapter(p) for p in paths], rank=6))
        where = sys.argv[1]
        make(where + "/s", 2, 64)
        run(where + "/warm", where + "/s", where + "/s")
        make(where + "/0", 4, n)
        make(where + "/1", 8, n)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run(where + "/out", where + "/0", where + "/1")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) * 1024 < 100 * 2**20


def test_the_table(deep: list[Path], tmp_path: Path) -> None:
    """Piped, as a program of its own: 80 columns, one line a layer, in natural order."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    command = [sys.executable, "-m", "fedlora", "aggregate", "site-0", "site-1"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out"), "--weights", "3", "1", "--rank", "3"],
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=deep[0].parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    lines = [line.rstrip() for line in done.stdout.splitlines() if str(tmp_path) not in line]
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split() == ["1", "weight", "0.7500", "site-0"]
    assert lines[1].split() == ["2", "weight", "0.2500", "site-1"]
    head = next(line for line in lines if "layer" in line)
    assert head.split() == ["layer", "r", "1", "r", "2", "rank", "rel.", "error"]
    rows = [line.split() for line in lines if line.lstrip().startswith("model.layers.")]
    numbers = [int(row[0].split(".")[2]) for row in rows]
    assert numbers == sorted(numbers)
    assert numbers.count(10) == numbers.count(2) == 2
    assert len(rows) == 24
    merged = aggregate([load_adapter(p) for p in deep], [3, 1], rank=3)
    for row in rows:
        layer = merged.layers[row[0]]
        assert row[1:3] == ["4" if "q_proj" in row[0] else "-", "2"]
        assert row[3] == str(layer.rank) == ("3" if "q_proj" in row[0] else "2")
        if "q_proj" in row[0]:
            assert float(row[4]) == pytest.approx(layer.error, rel=0.06)
            assert 0.001 < layer.error < 1
        else:
            assert float(row[4]) < 1e-5
    assert list(merged.layers) == [row[0] for row in rows]
    assert "written and read back:" in done.stdout.splitlines()[-1]
