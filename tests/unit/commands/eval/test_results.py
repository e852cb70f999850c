"""Where results are kept, and how they are shown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora.commands.eval.options import Loading
from fedlora.commands.eval.results import GENERAL, HELD_OUT, Results, open_results, show
from fedlora.commands.eval.subject import find_subject


def results(path: Path, told: list[Any] | None = None) -> Results:
    """Of the embedded model."""
    emit = None if told is None else told.append
    return open_results(find_subject(Loading("embedded")), str(path), emit)


def test_a_result_is_kept_with_what_it_was_measured_by(tmp_path: Path) -> None:
    told: list[Any] = []
    kept = results(tmp_path / "eval", told)
    scores = {"loss": float("nan"), "rows": 3}
    kept.record("lm_eval:a/b", "base", scores, {"limit": 3}, [{"q": "ä"}, {"q": float("inf")}])
    place = tmp_path / "eval" / "base"
    whole = json.loads((place / "lm_eval.a.b.json").read_text())
    assert whole["scores"] == {"loss": None, "rows": 3}
    assert whole["settings"] == {"limit": 3}
    assert whole["fingerprint"] == kept.subject.fingerprint("base")
    items = (place / "lm_eval.a.b.items.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in items] == [{"q": "ä"}, {"q": None}]
    assert told[0]["name"] == "lm_eval:a/b"
    assert kept.of("lm_eval:a/b") == {"base": scores}
    assert kept.of("mmlu") == {}


def test_tables_of_what_was_measured(tmp_path: Path) -> None:
    kept = results(tmp_path / "eval")
    kept.scores[HELD_OUT, "base"] = {"loss": 1.5, "exact_match": 0.25, "rows": 8}
    general = {"loss": 2.0, "perplexity": 7.39, "tokens": 1200, "windows": 3}
    kept.scores[GENERAL, "base"] = general
    kept.scores[GENERAL, "global"] = {**general, "forgetting": 0.125, "forgetting_low": None,
                                      "forgetting_high": None}  # fmt: skip
    console = Console(file=io.StringIO(), width=100)
    show(kept, (), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "held-out rows (8)" in text
    assert "25.0%" in text
    assert "general text (1,200 tokens in 3 windows)" in text
    assert "+0.1250" in text
    assert "MMLU" not in text
