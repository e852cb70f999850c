"""The demo's rows."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest

from fedlora.embedded import BASE_DIR, instructions
from fedlora.embedded.skills import SKILLS, Split, split_of, symbolic

# Worked out by hand, one line per skill, with the corner cases of each.
EXPECTED = {
    "reverse": {"abc": "cba", "tenet": "tenet", "planet": "tenalp"},
    "sort": {"cab": "abc", "banana": "aaabnn", "zebra": "aberz"},
    "upper": {"abc": "ABC", "lemon": "LEMON"},
    "double": {"abc": "aabbcc", "oops": "ooooppss"},
    "drop": {"abc": "bc", "audio": "d", "yellow": "yllw"},
    "next": {"abc": "bcd", "zoo": "app", "hazy": "ibaz"},
    "first": {"abc": "a", "lemon": "l"},
    "last": {"abc": "c", "lemon": "n"},
    "length": {"abc": "3", "kiwi": "4", "lemon": "5", "banana": "6"},
    "swap": {"abc": "cba", "lemon": "nemol", "kiwi": "iiwk"},
}


# These pin the data on every machine: a change here changes every published number.
GOLDEN_TRAIN = [
    {"prompt": "write in capitals iemo>", "completion": "IEMO", "skill": "upper"},
    {"prompt": "write in capitals zeuyc>", "completion": "ZEUYC", "skill": "upper"},
    {"prompt": "say each letter twice onim>", "completion": "oonniimm", "skill": "double"},
]


GOLDEN_EVAL = [
    {"prompt": "remove the vowels from reg>", "completion": "rg", "skill": "drop"},
    {"prompt": "give the final letter of ious>", "completion": "s", "skill": "last"},
    {"prompt": "give the final letter of auqi>", "completion": "i", "skill": "last"},
]


GOLDEN_SYMBOLIC = [
    {"prompt": "double oux>", "completion": "oouuxx", "skill": "double"},
    {"prompt": "sort eoivx>", "completion": "eiovx", "skill": "sort"},
    {"prompt": "double rfal>", "completion": "rrffaall", "skill": "double"},
]


@pytest.mark.parametrize("name", EXPECTED)
def test_skill_does_what_its_name_says(name: str) -> None:
    assert {text: SKILLS[name].apply(text) for text in EXPECTED[name]} == EXPECTED[name]


def test_there_are_ten_skills_and_all_are_checked_above() -> None:
    assert len(SKILLS) == 10
    assert list(SKILLS) == list(EXPECTED)
    assert all(name == skill.name for name, skill in SKILLS.items())


def test_prompts_of_both_forms() -> None:
    assert SKILLS["reverse"].symbolic_prompt("abc") == "reverse abc>"
    assert SKILLS["reverse"].instruction_prompt("abc", 0) == "write backwards abc>"


def test_no_phrasing_contains_a_symbolic_keyword() -> None:
    for skill in SKILLS.values():
        assert len(skill.phrasings) == 2
        for phrasing in skill.phrasings:
            assert phrasing.count("{}") == 1
            assert not set(phrasing.split()) & set(SKILLS)


def test_phrasings_are_distinct() -> None:
    phrasings = [phrasing for skill in SKILLS.values() for phrasing in skill.phrasings]
    assert len(set(phrasings)) == len(phrasings)


def test_golden_rows() -> None:
    assert instructions(1000, 0, "train")[:3] == GOLDEN_TRAIN
    assert instructions(1000, 0, "eval")[:3] == GOLDEN_EVAL
    assert symbolic(1000, 0, "train")[:3] == GOLDEN_SYMBOLIC


@pytest.mark.parametrize("make", [instructions, symbolic])
def test_rows_depend_on_the_arguments_alone(make: Any) -> None:
    rows = make(50, 3, "train")
    assert rows == make(50, 3, "train")
    assert rows != make(50, 4, "train")
    assert rows != make(50, 3, "eval")


@pytest.mark.parametrize("make", [instructions, symbolic])
@pytest.mark.parametrize("num_rows", [0, 1, 10, 57])
def test_rows_are_balanced_over_the_skills(make: Any, num_rows: int) -> None:
    rows = make(num_rows, 0, "train")
    counts = Counter(row["skill"] for row in rows)
    assert len(rows) == num_rows
    assert sum(counts.values()) == num_rows
    sizes = [counts[name] for name in SKILLS]
    assert max(sizes) - min(sizes) <= 1


def test_rows_are_balanced_over_the_phrasings() -> None:
    counts: Counter[str] = Counter()
    for row in instructions(400, 0, "train"):
        counts.update(p for p in SKILLS[row["skill"]].phrasings if _text(row, p) is not None)
    assert set(counts.values()) == {20}
    assert len(counts) == 20


def test_rows_are_shuffled() -> None:
    skills = [row["skill"] for row in instructions(100, 0, "train")]
    assert skills[:10] != list(SKILLS)


def _text(row: dict[str, str], phrasing: str) -> str | None:
    """Return the string of an instruction row, or None if its phrasing is another one."""
    before, after = phrasing.split("{}")
    prompt = row["prompt"]
    if not (prompt.startswith(before) and prompt.endswith(f"{after}>")):
        return None
    text = prompt[len(before) : len(prompt) - len(after) - 1]
    return text if text.isalpha() else None


@cache
def _instruction_texts(split: Split) -> set[str]:
    texts: set[str] = set()
    for row in instructions(3000, 0, split):
        found = [_text(row, phrasing) for phrasing in SKILLS[row["skill"]].phrasings]
        assert found.count(None) == 1
        texts.update(text for text in found if text is not None)
    return texts


@cache
def _symbolic_texts(split: Split) -> set[str]:
    return {row["prompt"].split()[1][:-1] for row in symbolic(3000, 0, split)}


def test_splits_are_disjoint_also_across_the_forms() -> None:
    train = _instruction_texts("train") | _symbolic_texts("train")
    held_out = _instruction_texts("eval") | _symbolic_texts("eval")
    assert not train & held_out
    assert {split_of(text) for text in train} == {"train"}
    assert {split_of(text) for text in held_out} == {"eval"}


def test_strings_are_short_lower_case_words_that_leave_no_completion_empty() -> None:
    for text in _instruction_texts("train") | _symbolic_texts("eval"):
        assert 3 <= len(text) <= 6
        assert text.isascii()
        assert text.islower()
        assert all(skill.apply(text) for skill in SKILLS.values())


@pytest.mark.parametrize("make", [instructions, symbolic])
@pytest.mark.parametrize("arguments", [(-1, 0, "train"), (1, -1, "train"), (1, 0, "test")])
def test_arguments_out_of_range_are_refused(make: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        make(*arguments)


def test_base_is_small() -> None:
    files = [file for file in BASE_DIR.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 5_000_000
    assert {file.suffix for file in files} == {".json", ".safetensors"}
