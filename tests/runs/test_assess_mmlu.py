"""`fedlora eval` on MMLU, held against lm-evaluation-harness over the same questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedlora.adapters.saved_adapter import write_adapter
from fedlora.commands.eval.harness import Harness, task_scores
from fedlora.commands.eval.mmlu import (
    Item,
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
from support.assess_mmlu import HUB, TASK
from support.rows import write_jsonl


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


def test_an_unknown_task_names_near_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the harness's own tasks; it reads a few of its thousands here."""
    manager = pytest.importorskip("lm_eval.tasks.manager")
    shutil.copytree(Path(manager.__file__).parent / "arc", tmp_path / "arc")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))
    with pytest.raises(InputError, match=r"no such task; did you mean.*arc_easy"):
        Harness(["arc_eazy"])
