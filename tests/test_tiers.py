"""Which tests `make test` leaves out, and that it says so."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

TESTS = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_slow(n): pass

def test_fast(): pass
"""


def last_line(where: Path, *options: str) -> str:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(where)]
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_the_last_line_says_what_was_left_out(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: slow\n")
    said = "2 slow tests were left out; make test-all runs them"
    assert last_line(tmp_path, "-n", "2", "-m", "not slow") == said
    assert last_line(tmp_path, "-m", "not slow") == said
    assert re.match(r"3 passed", last_line(tmp_path))


def test_make_test_leaves_out_the_slow_and_ci_runs_all() -> None:
    made = (REPOSITORY / "Makefile").read_text()
    recipes = dict(re.findall(r"^(test|test-all): \$\(STAMP\).*\n\t(.*)$", made, re.M))
    assert '-m "not slow"' in recipes["test"]
    assert "slow" not in recipes["test-all"]
    assert "step make test-all\n" in (REPOSITORY / ".ci" / "run").read_text()
