"""The tiers of tests: what marks them, what is left out, and what a unit test may not do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.tiers import TESTS, TIERS

REPOSITORY = TESTS.parent
CONFTEST = """
from support.tiers import (
    pytest_collection_modifyitems, pytest_deselected, pytest_sessionfinish, pytest_testnodedown,
    pytest_unconfigure,
)
"""
SLOW = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_slow(n): pass

def test_fast(): pass
"""
PROCESS = "a unit test starts no process"
RUN = "a unit test starts no run"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A directory of tests with the tiers of this one."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    markers = "\n".join(f"    {marker}: x" for marker in ("slow", *TIERS))
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\naddopts = --strict-markers --import-mode=importlib\nmarkers =\n{markers}\n"
    )
    for tier in TIERS:
        (tmp_path / tier).mkdir()
    (tmp_path / "unit" / "conftest.py").write_text((TESTS / "unit" / "conftest.py").read_text())
    return tmp_path


def output(where: Path, *options: str) -> str:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(where)]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, env=environment)
    return done.stdout.strip()


def last_line(where: Path, *options: str) -> str:
    return output(where, *options).splitlines()[-1]


def test_the_last_line_says_what_was_left_out(suite: Path) -> None:
    (suite / "test_it.py").write_text(SLOW)
    said = "2 slow tests were left out; make test-slow runs them"
    assert last_line(suite, "-n", "2", "-m", "not slow") == said
    assert last_line(suite, "-m", "not slow") == said
    assert re.match(r"3 passed", last_line(suite))


MARKED = """
def test_it(request):
    tiers = {mark.name for mark in request.node.iter_markers()} & {"unit", "runs", "system"}
    assert tiers == {request.path.parent.name}
"""


def test_a_tests_folder_is_its_marker(suite: Path) -> None:
    """It is there before `-m` chooses."""
    (suite / "unit" / "conftest.py").unlink()
    for tier in TIERS:
        (suite / tier / f"test_{tier}.py").write_text(MARKED)
    said = last_line(suite, "-m", "unit or runs")
    assert re.match(r"2 passed, 1 deselected", said)


OFFENDERS = [
    ("import subprocess; subprocess.run(['true'])", PROCESS),
    ("import os; os.system('true')", PROCESS),
    ("import os; os.fork() or os._exit(0)", PROCESS),
    ("import multiprocessing as m; m.get_context('spawn').Process().start()", PROCESS),
    ("import fedlora; fedlora.run()", RUN),
    ("from fedlora.engines.local import run_session; run_session(None)", RUN),
    # Code that catches what goes wrong in it does not hide the offence.
    ("import contextlib, os\n    with contextlib.suppress(BaseException): os.fork()", PROCESS),
]


def test_a_unit_test_that_does_more_is_found_out(suite: Path) -> None:
    lines = []
    for number, (body, _) in enumerate(OFFENDERS):
        lines += [f"def test_{number}():", f"    {body}"]
    (suite / "unit" / "test_it.py").write_text("\n".join([*lines, "def test_fine(): pass", ""]))
    said = output(suite, "-rfE", "--tb=no")
    for number, (_, why) in enumerate(OFFENDERS):
        assert re.search(rf"^(FAILED|ERROR) .*::test_{number} - .*{why}", said, re.M), said
    assert "test_fine" not in said


def test_other_tiers_may_start_processes(suite: Path) -> None:
    text = "import subprocess\ndef test_it(): subprocess.run(['true'], check=True)\n"
    (suite / "system" / "test_it.py").write_text(text)
    assert last_line(suite).startswith("1 passed")


def test_every_test_lies_in_a_tier() -> None:
    files = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    assert files <= set(TIERS)


def test_what_make_runs() -> None:
    """What `make test` leaves out is what `make test-slow` runs, and `.ci/run` does both."""
    made = (REPOSITORY / "Makefile").read_text()
    recipes = dict(re.findall(r"^(test(?:-\w+)?): \$\(STAMP\).*\n\t(.*)$", made, re.M))
    assert 'tests/unit -m "not slow"' in recipes["test-unit"]
    assert ' -m "not slow" ' in recipes["test"]
    assert " -m slow " in recipes["test-slow"]
    for both in ("test", "test-slow"):
        assert "tests/" not in recipes[both]
    assert re.search(r"^test-all: test test-slow ##", made, re.M)
    assert "step make --keep-going test-all\n" in (REPOSITORY / ".ci" / "run").read_text()
