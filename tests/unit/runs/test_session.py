"""What a run in one process needs, made from its configuration without any weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.model.sources import Source
from fedlora.runs.session import (
    assemble,
    classifies,
    general_rows,
    model_source,
    resolve_paths,
    starting_state,
    task_of,
)


def source(classifier: bool) -> Source:
    """A checkpoint of which only the kind is known."""
    return Source("m", SimpleNamespace(), classifier)


def test_who_says_that_a_classifier_is_trained() -> None:
    assert classifies(Config(), source(True))
    assert not classifies(Config(), source(False))
    assert not classifies(Config(template="chat"), source(True))
    assert not classifies(Config(lora_task_type="CAUSAL_LM"), source(True))
    assert classifies(Config(label_column_name="label"), source(False))
    assert task_of(("no", "yes")) == "SEQ_CLS"
    assert task_of(()) == "CAUSAL_LM"


def test_a_model_has_to_be_named() -> None:
    with pytest.raises(InputError, match="model_name_or_path: name the base model"):
        model_source(Config())
    assert model_source(Config(model_name_or_path="embedded")).config.model_type == "llama"


def test_paths_become_absolute_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.json").write_text("[]")
    (tmp_path / "data").mkdir()
    (tmp_path / "own.yaml").write_text("lora_r: 4\n")
    config = Config(
        model_name_or_path="org/model",
        dataset_name="embedded",
        eval_file="all.json",
        chat_template_path="vicuna",
        client_overrides="own.yaml",
    )
    resolved = resolve_paths(config)
    assert resolved.model_name_or_path == "org/model"
    assert resolved.dataset_name == "embedded"
    assert resolved.chat_template_path == "vicuna"
    assert resolved.eval_file == str(tmp_path / "all.json")
    assert resolved.client_overrides == {0: {"lora_r": 4}}
    pattern = resolve_paths(Config(train_file="data/part_*.json"))
    assert pattern.train_file == f"{tmp_path}/data/part_*.json"


def test_a_session_of_shapes_alone(small_run: dict[str, Any]) -> None:
    session = assemble(Config(**small_run), weights=False)
    assert list(session.federation.ranks) == [8, 4, 2, 2]
    assert list(session.federation.num_examples) == [24, 16, 12, 8]
    assert session.config.num_clients == 4
    assert session.config.template == "prompt_completion"
    assert session.asked["template"] == "auto"
    assert all(p.is_meta for p in session.base.model.parameters())
    assert session.federation.agreement.digest
    state = starting_state(session)
    assert state.round == 0
    assert state.levels == (2, 4, 8)


def test_general_text_has_no_meaning_for_a_classifier(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc")
    config = Config(general_file=str(tmp_path / "text.txt"))
    assert general_rows(Config(), None, 8, "SEQ_CLS") == ()
    with pytest.raises(InputError, match="general_file: a classifier has no loss on text"):
        general_rows(config, None, 8, "SEQ_CLS")
