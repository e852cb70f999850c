"""Models' answers to MT-bench, and who judges them."""

from __future__ import annotations

import json
from pathlib import Path

from fedlora.commands.eval.judged_answers import judge_of, measure_mt_bench
from fedlora.commands.eval.models import load_models
from fedlora.commands.eval.mt_bench import Question
from fedlora.commands.eval.options import Loading
from fedlora.commands.eval.request import Options
from support.measuring import measuring_of, said


def test_without_a_judge_the_answers_are_kept_and_nothing_is_graded(
    tiny_llama: Path, tmp_path: Path
) -> None:
    measuring = measuring_of(tiny_llama, tmp_path / "eval", max_new_tokens=4)
    models = load_models(measuring.subject, [])
    questions = [Question("1", "writing", ("Say a.", "Say b."))]
    assert measure_mt_bench(measuring, models, questions, None) is None
    path = measuring.results.directory_of("base") / "mt_bench.answers.jsonl"
    assert [json.loads(line)["question_id"] for line in path.read_text().splitlines()] == ["1"]
    assert measuring.results.scores == {}
    text = said(measuring)
    assert "MT-bench stops after the answers: no judge" in text
    assert "2 prompts did not fit into the context of 128 tokens" in text


def test_the_judge_is_the_one_asked_for() -> None:
    assert judge_of(Options(Loading("embedded"))) is None
    asked = Options(Loading("embedded"), judge_url="http://localhost/v1", judge_model="m")
    judge = judge_of(asked)
    assert judge is not None
    assert (judge.url, judge.model) == ("http://localhost/v1", "m")
