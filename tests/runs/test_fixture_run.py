"""A run directory that earlier code made (`tests/data/run`) still serves every verb."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedlora.commands.cli import main
from fedlora.embedded import BASE_DIR
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.safe_writing import verify
from support.paths import REPOSITORY

KEPT = REPOSITORY / "tests" / "data" / "run"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A copy of the directory: two rounds of three, then broken off."""
    return shutil.copytree(KEPT, tmp_path / "run")


def test_it_resumes(kept: Path) -> None:
    before = (kept / "metrics.jsonl").read_text()
    assert main(["run", "--resume", str(kept)]) == 0
    after = (kept / "metrics.jsonl").read_text()
    assert after.startswith(before)
    events = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert [(x["event"], x["round"]) for x in events] == [("resume", 2), ("round", 3), ("end", 3)]
    assert [x["client"] for x in events[1]["clients"]] == [0, 1, 2]
    assert all(not x["rejected"] for x in events[1]["clients"])
    verify(kept / "round-2")
    verify(kept / "round-3")
    assert (kept / "final" / "adapter_model.safetensors").is_file()


def test_it_is_reported(kept: Path) -> None:
    assert main(["report", str(kept), "--output", str(kept / "report.html")]) == 0
    page = (kept / "report.html").read_text()
    assert "exact" in page
    assert all(str(line["round"]) in page for line in read_metrics(kept))


def test_it_is_watched(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(kept)]) == 0
    assert "round 2 of 3" in capsys.readouterr().out
    assert main(["watch", str(kept), "--once"]) == 0
    assert "2/3" in capsys.readouterr().out.replace(" of ", "/")


def test_it_is_evaluated(kept: Path) -> None:
    """The adapter measures what it measured when its round was logged."""
    assert main(["eval", str(kept), "--num_threads", "1"]) == 0
    lines = read_metrics(kept)
    logged = next(x for x in lines if (x["event"], x["round"]) == ("round", 2))["evaluation"]
    scores = {x["model"]: x["scores"] for x in lines if x["event"] == "eval"}
    assert scores.keys() == {"base", "global"}
    assert scores["global"]["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert scores["global"]["token_accuracy"] == logged["token_accuracy"]
    assert scores["base"]["loss"] > scores["global"]["loss"]


def test_its_adapter_loads_in_peft(kept: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(BASE_DIR)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = base(tokens).logits
        model = PeftModel.from_pretrained(base, kept / "round-2")
        adapted = model(tokens).logits
    assert adapted.isfinite().all()
    assert not torch.equal(plain, adapted)
