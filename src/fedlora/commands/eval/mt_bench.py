"""Answers MT-bench's two-turn questions (arXiv 2306.05685) and has them graded by a judge.

Both turns are answered greedily; the judge grades each turn from 1 to 10 (`judge.py`). A model's
score is the mean over all turns. Answers and judgements are kept as they come; what was answered
and judged is not asked again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.commands.eval.asking import PromptFormat, answers
from fedlora.commands.eval.judge import Case, Judge, JudgeError, case, rating
from fedlora.data.row_files import read_rows
from fedlora.errors import InputError

WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose judge is shown the reference answer."""


@dataclass(frozen=True)
class Question:
    """A question of several turns.

    Args:
        id: `question_id`.
        category: writing, math ...
        turns: what the user says, one after the other.
        references: reference answers, one for each turn; empty: there are none.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()


def read_questions(path: Path, references: Path | None = None) -> list[Question]:
    """Questions in the benchmark's shape, and its reference answers.

    Args:
        path: rows with question_id, category and turns; `reference` may stand in them.
        references: rows with question_id and choices[0].turns.

    Raises:
        InputError: a file cannot be read or has another shape.
    """
    known: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(read_rows(references) if references else (), 1):
        try:
            known[str(row["question_id"])] = tuple(map(str, row["choices"][0]["turns"]))
        except (KeyError, IndexError, TypeError):
            raise InputError(
                f"{references}: row {number}: expected question_id and choices[0].turns"
            ) from None
    out = []
    for number, row in enumerate(read_rows(path), 1):
        turns = row.get("turns")
        if "question_id" not in row or not isinstance(turns, list) or not turns:
            raise InputError(f"{path}: row {number}: expected question_id, category and turns")
        if len(turns) > 2:
            raise InputError(f"{path}: row {number}: {len(turns)} turns; the judge knows two")
        name, category = str(row["question_id"]), str(row.get("category") or "all")
        answers = known.get(name) or tuple(map(str, row.get("reference") or ()))
        if category not in WITH_REFERENCE or len(answers) != len(turns):
            answers = ()
        out.append(Question(name, category, tuple(map(str, turns)), answers))
    if len({q.id for q in out}) < len(out):
        raise InputError(f"{path}: a question_id stands there twice")
    return out


# --- what is kept ---


def kept(path: Path) -> list[dict[str, Any]]:
    """The records of a file that only grows; a half-written last line counts for nothing."""
    if not path.is_file():
        return []
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def keep(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records and force them to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as out:
        out.write("\n" if torn else "")
        out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        out.flush()
        os.fsync(out.fileno())


# --- answers ---


def answered(
    questions: Sequence[Question],
    path: Path,
    model: Any,
    tokenizer: Any,
    prompt_format: PromptFormat,
    *,
    identity: str,
    max_new_tokens: int,
    context: int,
    batch_size: int,
) -> tuple[dict[str, list[str]], int]:
    """The answers to all turns, those on the disk among them.

    Args:
        questions: to answer.
        path: where answers are kept.
        model: of transformers.
        tokenizer: the model's.
        prompt_format: how a conversation is put to it.
        identity: of the model; answers of another one are not taken.
        max_new_tokens: longest answer of a turn.
        context: the model's, in tokens.
        batch_size: questions at once.

    Returns:
        Question id -> an answer for each turn, and how many prompts had to be cut.
    """
    settings = _digest(identity, prompt_format.name, str(max_new_tokens))
    digests = {q.id: _digest(*q.turns) for q in questions}
    out = {
        str(r["question_id"]): [str(x) for x in r["choices"][0]["turns"]]
        for r in kept(path)
        if r.get("settings") == settings and r.get("asked") == digests.get(str(r["question_id"]))
    }
    missing = [q for q in questions if q.id not in out]
    cuts = 0

    def say(talks: Sequence[Sequence[dict[str, str]]]) -> list[str]:
        """The model's next words in each conversation."""
        nonlocal cuts
        texts, cut = answers(
            model,
            tokenizer,
            [prompt_format.tokens(talk) for talk in talks],
            max_new_tokens=max_new_tokens,
            context=context,
            batch_size=batch_size,
        )
        cuts += sum(cut)
        return texts

    for at in range(0, len(missing), batch_size):
        part = missing[at : at + batch_size]
        out |= _conversed(part, say)
        records = [
            {
                "question_id": q.id,
                "category": q.category,
                "choices": [{"index": 0, "turns": out[q.id]}],
                "form": prompt_format.name,
                "max_new_tokens": max_new_tokens,
                "asked": digests[q.id],
                "settings": settings,
            }
            for q in part
        ]
        keep(path, records)
    return {q.id: out[q.id] for q in questions}, cuts


def _conversed(
    questions: Sequence[Question],
    say: Callable[[Sequence[Sequence[dict[str, str]]]], list[str]],
) -> dict[str, list[str]]:
    """Question id -> the answers to its turns; of each turn all questions are answered at once."""
    talks: dict[str, list[dict[str, str]]] = {q.id: [] for q in questions}
    for turn in range(max(len(q.turns) for q in questions)):
        now = [q for q in questions if turn < len(q.turns)]
        for q in now:
            talks[q.id].append({"role": "user", "content": q.turns[turn]})
        texts = say([talks[q.id] for q in now])
        for q, text in zip(now, texts, strict=True):
            talks[q.id].append({"role": "assistant", "content": text})
    return {
        name: [message["content"] for message in talk if message["role"] == "assistant"]
        for name, talk in talks.items()
    }


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


# --- judgements ---


@dataclass(frozen=True)
class Grade:
    """A judged turn; rating None: the judge gave none."""

    question: Question
    turn: int
    rating: float | None


def judged(
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[str]],
    path: Path,
    judge: Judge,
    *,
    threads: int = 4,
) -> tuple[list[Grade], JudgeError | None]:
    """A rating for each turn, those on the disk among them.

    Judgements without a rating are kept to be read, and asked for again the next time.

    Args:
        questions: that were answered.
        answers: question id -> answers.
        path: where judgements are kept.
        judge: the endpoint.
        threads: requests at once.

    Returns:
        What is graded, and why the judge stopped; None: it did not.
    """
    cases: dict[str, tuple[Question, int, Case]] = {}
    for q in questions:
        for turn in range(len(q.turns)):
            upto = slice(0, turn + 1)
            references = q.references[upto] if q.references else None
            request = case(q.turns[upto], list(answers[q.id])[upto], references)
            cases[_digest(judge.model, q.id, request.system, request.user)] = q, turn, request
    known = {r["case"]: r["rating"] for r in kept(path) if r.get("rating") is not None}
    grades = [Grade(q, turn, known[key]) for key, (q, turn, _) in cases.items() if key in known]
    waiting = {key: x for key, x in cases.items() if key not in known}
    problems: list[JudgeError] = []

    def ask(request: Case) -> str | None:
        if problems:  # what has not begun would fail in the same way
            return None
        try:
            return judge.ask(request)
        except JudgeError as error:
            problems.append(error)
            return None

    pool = ThreadPoolExecutor(max(1, threads))
    try:
        futures = {pool.submit(ask, x[2]): key for key, x in waiting.items()}
        for future in as_completed(futures):
            key = futures[future]
            q, turn, request = waiting[key]
            words = future.result()
            if words is None:
                continue
            value = rating(words)
            record = {
                "question_id": q.id,
                "category": q.category,
                "turn": turn + 1,
                "judge": judge.model,
                "form": request.form,
                "rating": value,
                "judgement": words,
                "case": key,
            }
            keep(path, [record])
            grades.append(Grade(q, turn, value))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return grades, problems[0] if problems else None


def scores(grades: Sequence[Grade], wanted: int) -> dict[str, Any] | None:
    """The mean rating, by turn and by category; the 95% interval is Student's over questions.

    Args:
        grades: of the turns.
        wanted: turns there are.

    Returns:
        None where nothing has a rating.
    """
    rated = [(g, g.rating) for g in grades if g.rating is not None]
    if not rated:
        return None

    def mean(chosen: Iterable[float]) -> float | None:
        values = list(chosen)
        return sum(values) / len(values) if values else None

    by_question: dict[str, list[float]] = {}
    for g, value in rated:
        by_question.setdefault(g.question.id, []).append(value)
    score = mean(value for _, value in rated)
    assert score is not None
    low, high = _interval([sum(x) / len(x) for x in by_question.values()], score)
    categories = list(dict.fromkeys(g.question.category for g, _ in rated))
    return {
        "score": score,
        "low": low,
        "high": high,
        "turn_1": mean(v for g, v in rated if g.turn == 0),
        "turn_2": mean(v for g, v in rated if g.turn == 1),
        "by_category": {
            c: mean(v for g, v in rated if g.question.category == c) for c in categories
        },
        "rated": len(rated),
        "turns": wanted,
        "without_rating": sum(g.rating is None for g in grades),
    }


def _interval(values: Sequence[float], centre: float) -> tuple[float | None, float | None]:
    """Student's interval of the mean of questions, which are drawn; their turns are not."""
    from scipy.stats import t

    k = len(values)
    if k < 2:
        return None, None
    mean = sum(values) / k
    error = math.sqrt(sum((x - mean) ** 2 for x in values) / (k - 1) / k)
    half = float(t.ppf(0.975, k - 1)) * error
    return centre - half, centre + half
