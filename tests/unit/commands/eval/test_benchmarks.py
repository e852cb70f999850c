"""Models measured on MMLU from a file (on the harness's tasks: tests/runs/test_assess_mmlu.py)."""

from __future__ import annotations

import json
from pathlib import Path

from fedlora.commands.eval.benchmarks import measure_mmlu
from fedlora.commands.eval.mmlu import read_items
from fedlora.commands.eval.models import load_models
from support.assess_mmlu import HUB
from support.measuring import measuring_of
from support.rows import write_jsonl


def test_mmlu_keeps_every_question_with_the_guess(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "mmlu.jsonl", HUB[:4])
    measuring = measuring_of(tiny_llama, tmp_path / "eval", mmlu_file=path)
    items = read_items(path)
    measure_mmlu(measuring, load_models(measuring.subject, []), items, [])
    scores = measuring.results.of("mmlu")["base"]
    place = measuring.results.directory_of("base")
    kept = [json.loads(x) for x in (place / "mmlu.items.jsonl").read_text().splitlines()]
    assert [line["question"] for line in kept] == [item.question for item in items]
    right = sum(line["guess"] == line["answer"] for line in kept)
    assert (scores["rows"], scores["accuracy"]) == (4, right / 4)
    assert json.loads((place / "mmlu.json").read_text())["settings"]["num_fewshot"] == 0
