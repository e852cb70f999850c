"""A participant's kit: whose it is, and how long its certificate is valid."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import pytest

from fedlora.commands.deploy.nvflare.provisioning import provision
from fedlora.commands.doctor.certificates import Credentials, certificate_checks, credentials_of
from fedlora.commands.doctor.checks import OK, PROBLEM, WARNING, Check
from support.federations import federation_of

NOW = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kit of the site alpha."""
    directory = tmp_path_factory.mktemp("kits")
    return provision(federation_of(directory), directory / "kept")["alpha"]


def checks(own: Credentials, name: str = "alpha", days: float = 0) -> list[Check]:
    """What is said of a certificate, some days from now."""
    return list(certificate_checks(own, name, NOW + datetime.timedelta(days=days)))


def test_a_good_one_says_until_when(kit: Path) -> None:
    found = checks(credentials_of(kit))
    assert [(check.name, check.state) for check in found] == [
        ("certificate", OK),
        ("federation's certificate", OK),
    ]
    assert "CN=alpha" in found[0].found
    assert "(359 days)" in found[0].found


@pytest.mark.parametrize(
    ("days", "state", "said"),
    [(340, WARNING, "(19 days)"), (400, PROBLEM, "ended on"), (-2, PROBLEM, "valid from")],
)
def test_its_end_and_a_clock_that_is_wrong(kit: Path, days: int, state: str, said: str) -> None:
    first, second = checks(credentials_of(kit), days=days)
    assert (first.state, second.state) == (state, state)
    assert said in first.found
    assert first.remedy


def test_what_does_not_belong_together(kit: Path, tmp_path: Path) -> None:
    other = provision(federation_of(tmp_path, name="others"), tmp_path / "kept")["alpha"]
    ours, theirs = credentials_of(kit), credentials_of(other)
    (wrong,) = [c for c in checks(Credentials(ours.certificate, ours.key, theirs.root)) if c.remedy]
    assert "is of another federation" in wrong.found
    (wrong,) = [c for c in checks(Credentials(ours.certificate, theirs.key, ours.root)) if c.remedy]
    assert "does not belong to" in wrong.found
    (wrong,) = [c for c in checks(ours, "beta") if c.remedy]
    assert "is that of alpha, not of beta" in wrong.found


def test_files_that_are_missing_broken_or_open_to_others(kit: Path, tmp_path: Path) -> None:
    copy = tmp_path / "kit"
    shutil.copytree(kit, copy)
    own = credentials_of(copy)
    own.key.chmod(0o644)
    assert [c.state for c in checks(own) if c.name == "private key"] == [WARNING]
    own.certificate.write_text("nothing")
    assert [(c.state, "cannot be read" in c.found) for c in checks(own)] == [(PROBLEM, True)]
    own.key.unlink()
    assert [(c.state, "is missing" in c.found) for c in checks(own)] == [(PROBLEM, True)]
