"""Holds a few questions of MT-bench."""

from __future__ import annotations

from fedlora.commands.eval.mt_bench import Question

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Say a.", "Say it again."]},
    {"question_id": 2, "category": "math", "turns": ["1+1?", "And 2 more?"]},
]


CASES = [Question("1", "writing", ("a", "b")), Question("2", "writing", ("c",))]
