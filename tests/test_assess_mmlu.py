"""MMLU from a file, against the public harness on the same items; the harness by task name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from conftest import write_jsonl
from fedlora.adapters.saved_adapter import write_adapter
from fedlora.commands.eval.harness import Harness, task_scores
from fedlora.commands.eval.mmlu import (
    Item,
    accuracy,
    guess,
    limited,
    log_likelihoods,
    prompt,
    read_items,
    scores,
    shots,
)
from fedlora.commands.eval.models import Models, load_models
from fedlora.commands.eval.options import Loading
from fedlora.commands.eval.subject import find_subject
from fedlora.commands.eval.verb import verb
from fedlora.errors import InputError
from fedlora.lowrank import LowRank
from fedlora.model.targets import find_targets

HUB = [
    {
        "question": f" What is {i} plus {i}? ",
        "choices": [str(2 * i + k) for k in range(4)],
        "answer": i % 4,
        "subject": "elementary_mathematics" if i % 3 else "world_religions",
    }
    for i in range(24)
]
TASK = """\
task: local_{subject}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
    dev: {dev}
test_split: test
fewshot_split: dev
fewshot_config:
  sampler: first_n
num_fewshot: {shots}
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about {words}.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. \
{{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
"""The harness's own MMLU task, over a file."""


def write_task(where: Path, items: list[Item], dev: list[Item], number: int) -> list[str]:
    """A task of the harness for every subject, and their names."""
    names = []
    for subject in sorted({item.subject for item in items}):
        files = []
        for kind, part in (("test", items), ("dev", dev)):
            values = [
                {"question": x.question, "choices": list(x.choices), "answer": x.answer}
                for x in part
                if x.subject == subject
            ]
            files.append(write_jsonl(where / f"{subject}_{kind}.jsonl", values))
        text = TASK.format(
            subject=subject,
            words=subject.replace("_", " "),
            file=files[0],
            dev=files[1],
            shots=number,
        )
        (where / f"{subject}.yaml").write_text(text)
        names.append(f"local_{subject}")
    return names


def both(
    models: Models, name: str, items: list[Item], dev: list[Item], number: int, where: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours and the harness's: `subject -> (log-likelihoods by item, accuracy)`."""
    names = write_task(where, items, dev, number)
    with models.using(name) as model:
        found = log_likelihoods(
            model,
            models.tokenizer,
            items,
            batch_size=5,
            context=models.context,
            examples=shots(dev, number),
        )
        theirs = Harness(names, where).run(model, models.tokenizer, batch_size=3)
    ours, public = {}, {}
    by_subject = scores(items, found)["by_subject"]
    for subject in sorted({item.subject for item in items}):
        of_it = [x for item, x in zip(items, found, strict=True) if item.subject == subject]
        ours[subject] = of_it, by_subject[subject]["accuracy"]
        samples = sorted(theirs["samples"][f"local_{subject}"], key=lambda s: s["doc_id"])
        answers = [[float(r[0]) for r in s["filtered_resps"]] for s in samples]
        public[subject] = answers, task_scores(theirs)[f"local_{subject}"]["acc"]
    return ours, public


def agree(ours: dict[str, Any], public: dict[str, Any]) -> None:
    for subject, (answers, share) in public.items():
        assert ours[subject][1] == share
        for one, other in zip(ours[subject][0], answers, strict=True):
            assert one == pytest.approx(other, abs=2e-3, rel=1e-4)
            assert guess(one) == guess(other)


def test_agrees_with_the_harness_on_real_questions(material: Path, tmp_path: Path) -> None:
    """A real model, 30 of the file's questions; prompts that are too long lose their head."""
    items = read_items(material / "datasets" / "mmlu" / "mmlu_test_1444.jsonl")
    subjects = ("abstract_algebra", "anatomy", "college_computer_science", "prehistory")
    subjects = (*subjects, "high_school_european_history")
    chosen = [item for item in limited(items, 6) if item.subject in subjects]
    assert len(chosen) == 30
    models = load_models(find_subject(Loading(str(material / "models" / "stories260K"))), ["base"])
    lengths = [len(models.tokenizer(prompt(item))["input_ids"]) for item in chosen]
    assert max(lengths) > models.context > min(lengths)
    agree(*both(models, "base", chosen, chosen, 0, tmp_path))


def test_agrees_with_the_harness_on_an_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    """With worked examples, letters of several tokens, and PEFT's layers in the model."""
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    targets = find_targets(base, "all-linear", str(tiny_llama))
    rng = torch.Generator().manual_seed(1)
    deltas = {
        name: LowRank(torch.randn(2, n, generator=rng), torch.randn(m, 2, generator=rng))
        for name, (m, n) in targets.shapes.items()
    }
    write_adapter(tmp_path / "adapter", deltas, targets)
    items = read_items(write_jsonl(tmp_path / "test.jsonl", HUB[4:]))
    dev = read_items(write_jsonl(tmp_path / "dev.jsonl", HUB[:4]))
    models = load_models(find_subject(Loading(str(tmp_path / "adapter"))), ["base", "adapter"])
    found = {}
    for name in ("adapter", "base"):
        (tmp_path / name).mkdir(exist_ok=True)
        ours, public = both(models, name, items, dev, 1, tmp_path / name)
        agree(ours, public)
        found[name] = ours
    assert found["adapter"] != found["base"]


# --- reading ---


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


# --- the verb ---


def test_tasks_by_name(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = read_items(write_jsonl(tmp_path / "all.jsonl", HUB))
    names = write_task(tmp_path, items, items, 0)
    found = tmp_path / "found"
    arguments = [
        *(str(tiny_llama), "--tasks", *names, "--include_path", str(tmp_path)),
        *("--mmlu_file", str(tmp_path / "all.jsonl"), "--limit", "6", "--output_dir", str(found)),
    ]
    assert verb(arguments) == 0
    shown = capsys.readouterr().out
    assert "lm-evaluation-harness" in shown
    assert "95% interval" in shown
    own = json.loads((found / "base" / "mmlu.json").read_text())["scores"]
    for name in names:
        theirs = json.loads((found / "base" / f"lm_eval.{name}.json").read_text())
        subject = name.removeprefix("local_")
        assert theirs["scores"]["acc"] == own["by_subject"][subject]["accuracy"]
        assert theirs["scores"]["rows"] == 6
        assert theirs["settings"]["num_fewshot"] == 0
        kept = (found / "base" / f"lm_eval.{name}.items.jsonl").read_text().splitlines()
        assert len(kept) == 6
    assert len((found / "base" / "mmlu.items.jsonl").read_text().splitlines()) == 12


def test_an_unknown_task_names_near_ones() -> None:
    with pytest.raises(InputError, match=r"no such task; did you mean.*arc_easy"):
        Harness(["arc_eazy"])


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
