"""`fedlora worker` without a worker: what it prints, checks and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.commands.cli import main
from fedlora.commands.worker import verb as worker_verb
from fedlora.commands.worker.example import EXAMPLE
from support.one_site import site_file
from support.rows import rows, write_jsonl


@pytest.fixture
def site(tiny_llama: Path, tmp_path: Path) -> str:
    """The file of a site that can work."""
    table = write_jsonl(tmp_path / "rows.jsonl", rows(8))
    return str(site_file(tmp_path / "clinic", tiny_llama, str(table)))


Captured = pytest.CaptureFixture[str]


def test_the_example_is_printed(capfd: Captured) -> None:
    assert main(["worker", "--example"]) == 0
    assert capfd.readouterr().out == EXAMPLE
    assert main(["worker", "--example", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"event": "example", "text": EXAMPLE}


def test_a_check_that_finds_nothing(site: str, capfd: Captured) -> None:
    assert main(["worker", "--site", site, "--check"]) == 0
    assert capfd.readouterr().out.startswith("clinic: ready\n")
    assert main(["worker", "--site", site, "--check", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["event"], found["ok"], found["train_rows"]) == ("check", True, 8)


def test_a_check_that_finds_something(tiny_llama: Path, tmp_path: Path, capfd: Captured) -> None:
    site = str(site_file(tmp_path, tiny_llama, "none.jsonl"))
    assert main(["worker", "--site", site, "--check"]) == 1
    said = capfd.readouterr().out
    assert said.startswith("clinic: cannot work\n  train_file: ")
    assert main(["worker", "--site", site, "--check", "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert (found["ok"], found["problem"].startswith("train_file: ")) == (False, True)


def test_a_unit_is_printed_or_written(site: str, tmp_path: Path, capfd: Captured) -> None:
    assert main(["worker", "--site", site, "--install"]) == 0
    printed = capfd.readouterr().out
    path = tmp_path / "x.service"
    assert main(["worker", "--site", site, "--install", "--output", str(path)]) == 0
    assert f"# written: {path}\n" in capfd.readouterr().out
    assert printed.startswith(path.read_text())
    assert main(["worker", "--site", site, "--install", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["name"], found["unit"]) == ("fedlora-clinic.service", path.read_text())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "worker: give the site's file, as --site SITE.yaml"),
        ("--site", "--site: give the site's file"),
        ("--site nowhere.yaml", "nowhere.yaml: no such configuration file"),
        ("now", "now: worker has no such option; see fedlora worker --help"),
        ("--site SITE --status --stop", "--status and --stop: give one of them"),
        ("--site SITE --output x", "--output belongs to --install"),
        ("--site SITE --install --output /no/where", "--output /no/where: cannot be written"),
        ("--site SITE --status", "no worker has its socket there; start it with: fedlora worker"),
        ("--site SITE --stop", "no worker has its socket there"),
    ],
)
def test_one_message_that_says_what_to_do(
    options: str, said: str, site: str, capsys: Captured
) -> None:
    arguments = [site if word == "SITE" else word for word in options.split()]
    assert main(["worker", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedlora: ")
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_worker_that_does_not_end_is_said(
    site: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(worker_verb.carrier, "stop", lambda address: None)
    monkeypatch.setattr(worker_verb, "_ENDING", 0.0)
    from fedlora.config.site import read_site

    socket = Path(read_site(site).socket)
    socket.parent.mkdir()
    socket.touch()
    assert main(["worker", "--site", site, "--stop"]) == 2
    assert "was told to end, and is still at its step" in capsys.readouterr().err
