"""`fedlora deploy`: what it takes, what it says, and its example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.deploy import verb as module
from fedlora.commands.deploy.deployed import Deployed, Folder
from fedlora.commands.deploy.example import EXAMPLE
from fedlora.commands.deploy.verb import verb
from fedlora.errors import InputError
from support.federations import federation_file

MADE = Deployed((Folder("alpha", "site", Path("x/alpha"), True),), ("keep it",))


def deploy(federation: Any, output: Path) -> Deployed:
    """Stands for an engine: the verb takes whichever has this function."""
    assert federation.name == "clinics"
    assert output == Path("x")
    return MADE


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(module, "ENGINES", {"pigeons": __name__})
    return ["pigeons", str(federation_file(tmp_path / "f.yaml")), "--output", "x"]


def test_folders_for_a_person(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(arguments) == 0
    told = capsys.readouterr().out
    assert "site    alpha  x/alpha  (made)" in told
    assert "note    keep it" in told


def test_folders_for_a_program(arguments: list[str]) -> None:
    told: list[Any] = []
    assert verb(arguments, told.append) == 0
    folder = {"participant": "alpha", "kind": "site", "path": "x/alpha", "new": True}
    assert told == [{"event": "deployed", "folders": [folder], "notes": ("keep it",)}]


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(["--example"]) == 0
    assert capsys.readouterr().out == EXAMPLE


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "give the engine that carries the messages; there are nvflare"),
        (["nvflar", "f.yaml"], "nvflar: deploy knows no such engine; did you mean nvflare"),
        (["nvflare"], "give one FEDERATION.yaml"),
        (["nvflare", "a", "b"], "give one FEDERATION.yaml"),
        (["nvflare", "f.yaml"], "give --output DIR"),
        (["nvflare", "none.yaml", "--output", "x"], "no such configuration file"),
    ],
)
def test_what_is_missing_is_told(given: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        verb(given)
