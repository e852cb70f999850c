"""What is exported: found in runs, rounds and PEFT directories, with or without the base."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.adapters.aggregate import save_adapter
from fedlora.commands.eval.models import tokenizer_of
from fedlora.commands.eval.options import Loading
from fedlora.commands.export.origin import Origin, find_origin, held_out
from fedlora.errors import InputError
from support.merging import change_config, made, peft_saves
from support.paths import REPOSITORY
from support.rows import rows, write_jsonl

RUN = REPOSITORY / "tests" / "data" / "run"


def found(what: Path | str, **options: Any) -> Origin:
    return find_origin(Loading(str(what), **options))


def test_a_run_gives_its_newest_round_and_a_round_itself() -> None:
    run, part = found(RUN), found(RUN / "round-2")
    assert run.path == part.path == RUN / "round-2"
    assert (run.model, part.model) == ("global", "adapter")
    assert run.subject is not None
    assert run.subject.round == 2
    assert run.adapter.deltas.keys() == part.adapter.deltas.keys()
    assert (run.classifies, run.labels) == (False, ())


def test_an_adapter_without_its_base_can_still_be_looked_at(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", made({"q_proj": ((4, 4), 2)}, base_model_name_or_path="./gone"))
    origin = found(tmp_path / "a")
    assert origin.subject is None
    assert origin.base_name == "./gone"
    with pytest.raises(InputError, match=r"gone.*--base names another base model"):
        origin.needed()
    with pytest.raises(InputError, match="elsewhere"):  # what the user names has to be there
        found(tmp_path / "a", base="./elsewhere")


def test_mistakes(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a model and holds no update"):
        found(tiny_llama)
    with pytest.raises(InputError, match="is one adapter; name the run's directory"):
        found(RUN / "round-2", round=1)
    with pytest.raises(InputError, match="holds no round-7"):
        found(RUN, round=7)
    with pytest.raises(InputError, match="base is no adapter; there are global"):
        found(RUN, models=("base",))
    with pytest.raises(InputError, match="client-3: no such model"):
        found(RUN, models=("client-3",))
    with pytest.raises(InputError, match="no such directory"):
        found(tmp_path / "nowhere")


def test_labels_are_those_of_the_configuration_or_numbers(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=3)
    path = peft_saves(tmp_path / "a", base, task_type="SEQ_CLS", target_modules=["q_proj"])
    change_config(path, base_model_name_or_path=str(tiny_llama))
    assert found(path).labels == ("0", "1", "2")
    config = json.loads((tiny_llama / "config.json").read_text())
    config["id2label"] = {"2": "c", "0": "a", "1": "b"}
    (path / "config.json").write_text(json.dumps(config))
    origin = found(path)
    assert (origin.classifies, origin.labels) == (True, ("a", "b", "c"))


def test_rows_of_a_file(tiny_llama: Path, tmp_path: Path) -> None:
    origin = found(RUN)
    tokenizer = tokenizer_of(origin.needed())
    write_jsonl(tmp_path / "rows.jsonl", rows(6))
    given = held_out(origin, tmp_path / "rows.jsonl", 256, tokenizer)
    assert given is not None
    assert given.as_json == {"where": "rows.jsonl", "rows": 6, "of": 6}
    lone = found(peft_saves(tmp_path / "a", tiny_llama, target_modules=["q_proj"]))
    assert held_out(lone, None, 256, tokenizer) is None
    text = tmp_path / "text.jsonl"
    write_jsonl(text, [{"text": "abc abc"}, {"text": "xyz"}])
    of_text = held_out(lone, text, 1, tokenizer)
    assert of_text is not None
    assert of_text.as_json == {"where": "text.jsonl", "rows": 1, "of": 2}
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError):
        held_out(lone, tmp_path / "empty.jsonl", 1, SimpleNamespace())
