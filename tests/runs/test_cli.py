"""`fedlora run` as a user types it: its data, its best round, where it may write."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora.commands.cli import main
from fedlora.config.config import Config
from fedlora.config.yaml_file import read_yaml
from fedlora.embedded import CONFIG
from fedlora.runs.metrics_log import read_metrics
from support.script import (
    _offline,  # noqa: F401
    _signals_as_they_were,  # noqa: F401
    here,  # noqa: F401
    site,  # noqa: F401
)


def test_json(site: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "my.yaml", "--json"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert [e["event"] for e in events] == ["begin", "start", "round", "round", "end"]
    assert events[1:] == read_metrics(site / "out")[1:]


def test_data_of_ones_own_without_a_file(
    here: Path, tiny_llama: Path, site_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second example of `fedlora run --help`: no clients or columns of the embedded data."""
    monkeypatch.chdir(site_files)
    out = here / "out"
    argv = f"""run --model_name_or_path {tiny_llama} --train_file 'site_*.jsonl'
        --eval_file eval.jsonl --lora_target_modules q_proj v_proj --learning_rate 3e-4
        --num_rounds 1 --max_steps 1 --num_threads 1 --output_dir {out}"""
    assert main(shlex.split(argv)) == 0
    config = read_yaml(out / "config.yaml")
    assert config["client_ranks"] == [16] * 4
    assert config["partition"] == "iid"
    assert config["dataset_name"] is None


def test_the_embedded_defaults_stay_without_data_of_ones_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = list[Config]()

    class SeenError(fedlora.FedloraError):
        pass

    def run(config: Config, **_: Any) -> None:
        seen.append(config)
        raise SeenError

    monkeypatch.setattr("fedlora.engines.local.run", run)
    assert main(["run", "--num_rounds", "3", "--method", "flora"]) == 2
    assert main(["run", "--dataset_name", "embedded", "--num_rounds", "3"]) == 2
    assert main(["run", "embedded", "--num_rounds", "3"]) == 2
    embedded = read_yaml(CONFIG)
    for config in seen:
        assert config.dataset_name == "embedded"
        assert config.client_ranks == embedded["client_ranks"]
        assert config.num_rounds == 3
    assert [config.method for config in seen] == ["flora", "exact", "exact"]


def test_best_round_is_named(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Losses fall, so that the base is "best" where greater is better.
    keys = ["--greater_is_better", "true", "--load_best_model_at_end", "true", "--max_steps", "5"]
    assert main(["run", "my.yaml", *keys]) == 0
    assert "ended after round 2; best: round 0; final/ holds round 0\n" in capsys.readouterr().out


def test_no_evaluation(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "my.yaml", "--eval_file", "none"]) == 0
    out = capsys.readouterr().out
    assert "0 rows to evaluate on" in out
    assert "ended after round 2; final/ holds round 2\n" in out


def test_an_output_directory_that_cannot_be_written(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (site / "closed").mkdir(mode=0o555)
    assert main(["run", "my.yaml", "--output_dir", "closed/out"]) == 2
    assert "output_dir: closed/out: cannot be made: Permission denied" in capsys.readouterr().err


def test_an_output_directory_that_nobody_can_make(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc, where nobody can make a directory")
    assert main(["run", "my.yaml", "--output_dir", "/proc/fedlora/out"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fedlora: output_dir: /proc/fedlora/out: cannot be made: ")


def test_an_adapter_of_another_model_is_refused_before_anything_is_written(
    site: Path, tiny_gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["--model_name_or_path", str(tiny_gpt2), "--output_dir", "other", "--num_rounds", "1"]
    assert main(["run", "my.yaml", *keys]) == 0
    capsys.readouterr()
    assert main(["run", "my.yaml", "--init_adapter", "other/final"]) == 2
    message = capsys.readouterr().err
    assert "init_adapter: other/final changes transformer.h.0" in message.replace(f"{site}/", "")
    assert not (site / "out").exists()
