"""`fedlora demo` and the embedded default, in a short form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.cli import main
from fedlora.commands.report.series import group
from fedlora.commands.run_files import read_run
from fedlora.runs.metrics_log import read_metrics

SHORT = {
    "num_rounds": "1",
    "max_steps": "1",
    "max_train_samples": "16",
    "per_device_train_batch_size": "4",
    "max_eval_samples": "12",
    "client_ranks": ["8", "4"],
    "num_clients": "2",
    "num_threads": "1",
    "processes": "1",
}
"""As few seconds as it takes; processes start anew, and load everything anew."""


def words(keys: dict[str, Any]) -> list[str]:
    out = []
    for key, value in keys.items():
        out += [f"--{key}", *(value if isinstance(value, list) else [str(value)])]
    return out


def test_demo_ends_with_a_table_a_picture_and_what_to_type_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fedlora-demo").mkdir()
    (tmp_path / "fedlora-demo" / "kept").write_text("mine")
    assert main(["demo", *words({**SHORT, "seeds": ["3", "5"]})]) == 0
    out = capsys.readouterr().out
    where = tmp_path / "fedlora-demo-2"
    assert "exact and flora on seeds 3 5, and every client of seed 3 alone:" in out
    assert "6 runs, several at a time, into fedlora-demo-2/" in out
    assert "client 1 alone, r=4 seed 3" in out
    assert re.search(r"method +0 +1 +up +down", out)
    assert out.index("held-out exact match (%)") < out.index("exact match (%) by round")
    assert "fedlora run --help" in out
    named = {"exact-seed-3", "exact-seed-5", "flora-seed-3", "flora-seed-5", "alone-0", "alone-1"}
    assert {p.name for p in where.iterdir() if p.is_dir()} == named
    assert all((where / name / "final" / "adapter_config.json").is_file() for name in named)
    assert [p.name for p in (tmp_path / "fedlora-demo").iterdir()] == ["kept"]
    # What was shown is what was measured, and the page of the runs tells them apart.
    for name in sorted(named):
        lines = read_metrics(where / name)
        assert [x["round"] for x in lines if x.get("evaluation")] == [0, 1]
    assert main(["report", "fedlora-demo-2"]) == 0
    runs = [read_run(where / name, name) for name in sorted(named)]
    assert sorted((x.label, len(x.runs)) for x in group(runs)) == [
        ("client 0 alone", 1),
        ("client 1 alone", 1),
        ("exact", 2),
        ("flora", 2),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "flora"], "use fedlora run"),
        (["--seeds", "0", "0"], "seeds: ['0', '0']: expected different whole numbers from 0"),
        (["--seeds", "x"], "seeds: 'x': expected different whole numbers from 0"),
        (["--seed", "-1"], "seeds: '-1': expected different whole numbers from 0"),
        (["--processes", "0"], "processes: '0': expected a whole number from 1"),
        (["--num_roundz", "3"], "num_roundz: unknown configuration key"),
    ],
)
def test_demo_refuses(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *words]) == 2
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_run_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {**SHORT, "seeds": "0", "lora_target_modules": "nowhere"}
    assert main(["demo", *words(keys)]) != 0
    said = capsys.readouterr().err
    assert "fedlora-demo/exact-seed-0: " in said
    assert "nowhere" in said
