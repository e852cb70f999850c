"""MT-Bench: what the judge is told, how its ratings are read, and which files are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fedlora.commands.eval.judge import Judge, case, rating
from fedlora.commands.eval.mt_bench import Grade, read_questions, scores
from fedlora.errors import InputError
from support.assess_mt_bench import CASES, QUESTIONS
from support.rows import write_jsonl


@pytest.mark.parametrize(
    ("turns", "references", "form", "digest"),
    [
        (1, False, "single-v1", "b617159959147bd6"),
        (1, True, "single-math-v1", "47b1908482a2dff1"),
        (2, False, "single-v1-multi-turn", "bce12f00d1af4270"),
        (2, True, "single-math-v1-multi-turn", "0f9d1dca958f4ab2"),
    ],
)
def test_the_judge_is_told_the_public_form(
    turns: int, references: bool, form: str, digest: str
) -> None:
    """SHA-256 of the benchmark's own system prompts and templates, filled with q1, a1, r1 ..."""
    numbers = range(1, turns + 1)
    found = case(
        [f"q{i}" for i in numbers],
        [f"a{i}" for i in numbers],
        [f"r{i}" for i in numbers] if references else None,
    )
    assert found.form == form
    text = f"{found.system}|{found.user}"
    assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Fine. Rating: [[8]]", 8.0),
        ("Rating: [[7.5]] of 10", 7.5),
        ("[[3]] then [[9]]", 3.0),
        ("Rating: [6]", 6.0),
        ("Rating: [[10]]", 10.0),
        ("Rating: 6", None),
        ("Rating: [[0]]", None),
        ("Rating: [[11]]", None),
        ("", None),
    ],
)
def test_ratings(text: str, wanted: float | None) -> None:
    assert rating(text) == wanted


def test_the_benchmarks_files(material: Path) -> None:
    where = material / "datasets" / "mt_bench"
    found = read_questions(where / "question.jsonl", where / "reference_answer_gpt-4.jsonl")
    assert len(found) == 80
    assert all(len(q.turns) == 2 for q in found)
    with_reference = [q for q in found if q.references]
    assert {q.category for q in with_reference} == {"math", "reasoning", "coding"}
    assert len(with_reference) == 30
    alone = read_questions(where / "question.jsonl")  # some have a reference of their own
    assert 0 < sum(bool(q.references) for q in alone) < 30


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for values, wanted in (
        ([{"prompt": "x"}], "row 1: expected question_id"),
        ([QUESTIONS[0], QUESTIONS[0]], "twice"),
        ([{"question_id": 1, "turns": ["a", "b", "c"]}], "the judge knows two"),
    ):
        with pytest.raises(InputError, match=wanted):
            read_questions(write_jsonl(path, values))
    good = write_jsonl(tmp_path / "good.jsonl", QUESTIONS)
    with pytest.raises(InputError, match=r"choices\[0\].turns"):
        read_questions(good, write_jsonl(path, [{"question_id": 1}]))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'fedlora\[eval\]'"):
        Judge("http://x", "j")


def test_scores() -> None:
    one, two = CASES
    grades = [Grade(one, 0, 4.0), Grade(one, 1, 6.0), Grade(two, 0, 8.0), Grade(two, 0, None)]
    found = scores(grades, 5)
    assert found is not None
    assert found["score"] == 6.0
    assert (found["turn_1"], found["turn_2"], found["rated"], found["turns"]) == (6.0, 6.0, 3, 5)
    assert found["without_rating"] == 1
    assert found["high"] - found["score"] == pytest.approx(found["score"] - found["low"])
    assert scores([Grade(one, 0, None)], 2) is None
