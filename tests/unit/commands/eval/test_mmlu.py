"""MMLU from a file, against the public harness on the same items; the harness by task name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from fedlora.commands.eval.harness import Harness
from fedlora.commands.eval.mmlu import (
    Item,
    accuracy,
    limited,
    prompt,
    read_items,
    scores,
)
from fedlora.errors import InputError
from support.assess_mmlu import HUB, TASK
from support.rows import write_jsonl


def test_the_whole_file_is_read(material: Path) -> None:
    path = material / "datasets" / "mmlu" / "mmlu_test_1444.jsonl"
    items, raw = read_items(path), json.loads(path.read_text())
    assert len(items) == 1444
    assert len({item.subject for item in items}) == 57
    assert all(len(item.choices) == 4 for item in items)
    for item, row in zip(items, raw, strict=True):
        letter = "ABCD"[item.answer]
        assert row["output"].strip() == f"The answer is: {letter}. {item.choices[item.answer]}"
        assert item.question in row["input"]
        assert "Options:" not in item.question
        # Put together again, it is what stands in the file, spaces aside.
        options = "".join(f",{x}.{y}" for x, y in zip("ABCD", item.choices, strict=True))
        again = f"Qusetion:{item.question}Options:{options.removeprefix(',')}"
        assert "".join(again.split()) == "".join(row["input"].split())
    counts = Counter(item.answer for item in items)
    assert min(counts.values()) > 300


@pytest.mark.parametrize(
    ("text", "output", "choices", "answer"),
    [
        ("Q: x? Options: A. 1, 2, B. 3, C. 4, 5", "The answer is: B. 3", ("1, 2", "3", "4, 5"), 1),
        # An option that looks like the next one: the answer's text tells.
        (
            "x? Options: A. plan B. works, B. it, C. fails, B. or not, C. so, D. end",
            "The answer is: B. it, C. fails, B. or not",
            ("plan B. works", "it, C. fails, B. or not", "so", "end"),
            1,
        ),
        (
            "Which Options: are good? Options: A. yes, B. no",
            "The answer is: A. yes",
            ("yes", "no"),
            0,
        ),
        ("x? Options:\nA) one\nB) two", "B", ("one", "two"), 1),
        ("x? Options: A. one; B. two", "The answer is (A)", ("one", "two"), 0),
    ],
)
def test_options_in_a_text(
    tmp_path: Path, text: str, output: str, choices: tuple[str, ...], answer: int
) -> None:
    row = {"instruction": "i", "input": f"Question: {text}", "output": output, "class": "c"}
    (item,) = read_items(write_jsonl(tmp_path / "x.jsonl", [row]))
    assert (item.choices, item.answer, item.subject) == (choices, answer, "c")
    assert item.question == text[: text.rindex("Options:")].strip()


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "x"}, "row 2: it has the columns prompt"),
        ({"input": "x? Options: A. a, B. b", "output": "because"}, "names no letter"),
        ({"input": "x? Options: A. a, B. b", "output": "The answer is: B. c"}, "stands at B"),
        ({"input": "x?", "output": "The answer is: B. c"}, "no 'Options:"),
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, "none of the 2 choices"),
        ({"question": "x", "choices": ["a"], "answer": 0}, "choices"),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, row: dict[str, Any], wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        read_items(write_jsonl(tmp_path / "x.jsonl", [HUB[0], row]))


def test_the_hubs_shape(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{**HUB[0], "answer": "C"}, HUB[1]]))
    items = read_items(path)
    assert [item.answer for item in items] == [2, 1]
    assert prompt(items[1], [items[0]]) == (
        "The following are multiple choice questions (with answers) about elementary mathematics."
        "\n\nWhat is 0 plus 0?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: C\n\n"
        "What is 1 plus 1?\nA. 2\nB. 3\nC. 4\nD. 5\nAnswer:"
    )


def test_scores() -> None:
    items = [Item(s, "q", ("a", "b"), a) for s, a in (("x", 0), ("x", 1), ("x", 1), ("y", 0))]
    found = scores(items, [[-1.0, -2.0], [-1.0, -2.0], [-3.0, -2.0], [-1.0, -1.0]])
    assert found["accuracy"] == 0.75
    assert found["subject_mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["by_subject"]["x"]["correct"] == 2
    interval = binomtest(3, 4).proportion_ci(method="wilson")
    assert (found["low"], found["high"]) == (interval.low, interval.high)
    assert accuracy(0, 5)["low"] == pytest.approx(0.0)
    # Textbook: 15 of 20 -> 0.531 .. 0.888.
    assert accuracy(15, 20)["low"] == pytest.approx(0.5313, abs=1e-4)
    assert accuracy(15, 20)["high"] == pytest.approx(0.8881, abs=1e-4)


def test_limits_are_by_subject() -> None:
    items = [Item(s, str(i), ("a", "b"), 0) for i in range(6) for s in "xyz"]
    assert Counter(item.subject for item in limited(items, 2)) == {"x": 2, "y": 2, "z": 2}
    assert len(limited(items, 0.5)) == 9
    assert len(limited(items, None)) == 18


def test_a_task_without_its_data(tmp_path: Path) -> None:
    text = TASK.format(
        subject="x", words="x", file=tmp_path / "gone.jsonl", dev=tmp_path / "gone.jsonl", shots=0
    )
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=r"local_x: its data cannot be loaded.*network"):
        Harness(["local_x"], tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        Harness(["local_x"], tmp_path / "gone")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install 'fedlora\[eval\]'"):
        Harness(["arc_easy"])
