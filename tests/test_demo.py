"""`fedlora demo` and the embedded default, in a short form."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy.stats import ttest_rel

from fedlora.commands.cli import main
from fedlora.commands.demo import showcase
from fedlora.commands.report.reading import read_run
from fedlora.commands.report.series import group
from fedlora.config.config import Config
from fedlora.config.sources import read_yaml
from fedlora.embedded import CONFIG
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.session import alone, assemble

SHORT = {
    "num_rounds": "1",
    "max_steps": "1",
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


def made(
    curves: dict[str, dict[int, list[float]]], alone: dict[int, float] | None = None
) -> showcase.Shown:
    sizes = dict.fromkeys(curves, (31.4e6, 250.1e6))
    return showcase.Shown(curves, alone or {}, sizes, 200.0, Path("fedlora-demo"))


def printed(shown: showcase.Shown) -> str:
    out = io.StringIO()
    showcase.show(shown, Console(file=out, width=80))
    return out.getvalue()


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


CURVES = {
    "exact": {0: [0.0, 0.40, 0.60], 1: [0.0, 0.30, 0.70], 2: [0.0, 0.20, 0.65]},
    "flora": {0: [0.0, 0.30, 0.66], 1: [0.0, 0.33, 0.61], 2: [0.0, 0.30, 0.65]},
}


def test_the_table_has_means_over_seeds_and_says_what_differences_are_worth() -> None:
    text = printed(made(CURVES, {0: 0.2, 1: 0.3, 2: 0.4}))
    assert "mean ± standard deviation over 3 seeds" in " ".join(text.split())
    assert re.search(r"exact +0\.0 +30\.0 +65\.0 ± 5\.0 +31\.4 MB +250\.1 MB", text)
    assert re.search(r"flora +0\.0 +31\.0 +64\.0 ± 2\.6 ", text)
    assert re.search(r"alone, mean +30\.0 ", text)
    assert re.search(r"alone, best +40\.0 ", text)
    assert re.search(r"exact +60\.0, 70\.0, 65\.0", text)
    # scipy's paired t-test gives the same interval.
    a, b = ([100 * x[-1] for x in CURVES[m].values()] for m in ("exact", "flora"))
    low, high = ttest_rel(a, b).confidence_interval(0.95)
    said = f"exact against flora: +1.0 points, 95% interval {low:+.1f} to {high:+.1f}"
    assert f"{said}:\n  these seeds show no difference" in text
    assert "alone: the 3 clients of seed 0" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_a_difference_in_every_seed_is_said_to_be_one_and_a_single_seed_is_not() -> None:
    apart = {**CURVES, "flora": {s: [0.0, 0.1, x[-1] - 0.2] for s, x in CURVES["exact"].items()}}
    assert "these seeds show a difference" in printed(made(apart))
    one = {method: {0: x[0]} for method, x in CURVES.items()}
    text = printed(made(one))
    assert "one seed shows no difference and no tie" in text
    assert "±" not in text


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        ({}, [0, 1, 2]),
        ({"seed": "7"}, [7, 8, 9]),
        ({"seeds": "4"}, [4]),
        ({"seeds": ["4", "2"]}, [4, 2]),
        ({"seeds": [1, 2, 3], "seed": 9}, [1, 2, 3]),
    ],
)
def test_seeds(given: dict[str, Any], seeds: list[int]) -> None:
    assert showcase._seeds(dict(given)) == seeds


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
