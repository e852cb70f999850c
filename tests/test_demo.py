"""`fedlora demo` and the embedded default, in a short form."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.cli import main
from fedlora.config import Config
from fedlora.demo import CONFIG
from fedlora.setup import alone, assemble
from fedlora.showcase import demo
from fedlora.sources import read_yaml

SHORT = ["--num_rounds", "1", "--max_steps", "1", "--max_eval_samples", "12", "--num_threads", "1"]


def test_demo_ends_with_a_table_a_picture_and_what_to_type_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *SHORT]) == 0
    out = capsys.readouterr().out
    for name in ("exact", "flora", "zero_pad", "alone", "client 9, rank  4"):
        assert name in out
    assert out.index("exact match on held-out instructions") < out.index("exact match (%) by round")
    assert "fedlora run --help" in out
    assert (tmp_path / "fedlora-demo" / "zero_pad" / "final" / "adapter_config.json").is_file()
    assert (tmp_path / "fedlora-demo" / "alone-9" / "final").is_dir()


def test_demo_returns_every_curve_and_leaves_an_earlier_one_alone(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    curves = demo(
        {
            "num_rounds": 1,
            "max_steps": 1,
            "max_eval_samples": 12,
            "num_threads": 1,
            "output_dir": str(tmp_path / "d"),
        }
    )
    assert {name: len(values) for name, values in curves.items()} == dict.fromkeys(
        ("exact", "flora", "zero_pad", "alone mean", "alone best"), 2
    )
    assert not any((tmp_path / "d").iterdir())
    assert (tmp_path / "d-2" / "exact" / "final").is_dir()


def test_demo_refuses_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--method", "flora"]) == 2
    assert "use fedlora run" in capsys.readouterr().err


def test_the_embedded_default_is_what_the_documentation_says() -> None:
    session = assemble(Config(**{**read_yaml(CONFIG), "num_threads": 1}))
    assert list(session.federation.ranks) == [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
    assert sum(session.federation.num_examples) == 2400
    assert len(session.data.eval) == 480
    assert session.config.eval_exact_match is True


def test_a_client_alone_keeps_its_rows_and_rank(tmp_path: Path) -> None:
    session = assemble(Config(**{**read_yaml(CONFIG), "num_threads": 1}))
    lone = alone(session, 3, tmp_path / "alone")
    assert list(lone.federation.ranks) == [16]
    assert lone.data.clients == (session.data.clients[3],)
    assert lone.data.eval is session.data.eval
