"""The process of a study's runs: which of the ways to make one a job takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.client.trainer import train
from fedlora.commands.study import worker
from fedlora.engines import local
from fedlora.runs import lone_session, session


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs that would have been made; each leaves `final/` and a round."""
    out: list[Any] = []

    def leave(path: Path) -> None:
        (path / "final").mkdir(parents=True, exist_ok=True)
        (path / "round-1").mkdir()

    def run(config: Any, resume: Any = None, **named: Any) -> None:
        out.append(("resume" if resume else "run", config, named["train_function"]))
        assert resume or named["measure"] is False, "methods would be compared in several dtypes"
        leave(Path(resume or config.output_dir))

    def run_session(lone: Any, **named: Any) -> None:
        out.append(("alone", lone.client, named["train_function"]))
        leave(lone.path)

    monkeypatch.setattr(local, "run", run)
    monkeypatch.setattr(local, "run_session", run_session)

    def assemble(config: Any, *, measure: bool = False) -> str:
        assert not measure, "methods would be compared in several dtypes"
        return "assembled"

    monkeypatch.setattr(session, "assemble", assemble)
    monkeypatch.setattr(
        lone_session, "alone", lambda whole, client, path: SimpleNamespace(client=client, path=path)
    )
    return out


def job(path: Path, **more: Any) -> dict[str, Any]:
    """What the study asks for."""
    return {"path": str(path), "keys": {"num_rounds": 3}, "alone": None, "trainer": None, **more}


def test_a_new_run_and_what_is_left_of_it(calls: list[Any], tmp_path: Path) -> None:
    worker._make(job(tmp_path / "a"), print)
    ((how, config, trainer),) = calls
    assert (how, config.num_rounds, trainer) == ("run", 3, train)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["final"]


def test_a_run_that_was_begun_goes_on_and_a_client_alone_begins_again(
    calls: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("")
    worker._make(job(tmp_path / "a"), print)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text("")
    worker._make(job(tmp_path / "b", alone=2), print)
    assert [(how, what) for how, what, _ in calls] == [("resume", None), ("alone", 2)]
    assert not (tmp_path / "b" / "config.yaml").exists()


def test_memory_is_counted_in_bytes() -> None:
    assert worker._peak() > 2**20
