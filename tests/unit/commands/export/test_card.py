"""The model card: TRL's fields, the federation, and nothing of this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fedlora.commands.eval.options import Loading
from fedlora.commands.export.card import MOST_ROUNDS, Written, _evaluations, model_card
from fedlora.commands.export.origin import find_origin
from support.paths import REPOSITORY

ORIGIN = find_origin(Loading(str(REPOSITORY / "tests" / "data" / "run")))


def card(format: str, name: str = "me/adapter") -> str:
    return model_card(ORIGIN, Written(format, name, ["rank 7", "error 0"]))


@pytest.mark.parametrize("format", ["peft", "mlx", "merged"])
def test_the_fields_that_the_hub_reads(format: str) -> None:
    _, head, body = card(format).split("---\n", 2)
    fields = yaml.safe_load(head)
    library = "transformers" if format == "merged" else format
    assert fields["library_name"] == library
    assert fields["model_name"] == "adapter"
    assert fields["licence"] == "license"
    assert fields["pipeline_tag"] == "text-generation"
    assert {"generated_from_trainer", "fedlora", "federated-learning"} <= set(fields["tags"])
    assert "base_model" not in fields  # a directory of this machine
    assert body.lstrip().startswith("# Model Card for adapter\n")
    for heading in ("## Quick start", "## Training procedure", "### Framework versions"):
        assert f"\n{heading}\n" in body


def test_it_says_what_the_federation_was() -> None:
    text = card("peft")
    for row in (
        "| clients | 3 |",
        "| ranks of the clients | 4 x 1, 2 x 1, 1 x 1 |",
        "| rounds | 2 |",
        "| bytes up, all rounds | 114.7 KB |",
        "- rank 7",
    ):
        assert row in text
    lines = text[text.index("### Evaluation") :].splitlines()
    assert lines[2] == "| round | loss | perplexity | token accuracy |"
    assert [line.split(" | ")[0] for line in lines[4:7]] == ["| 0", "| 1", "| 2"]


def test_nothing_of_this_machine_is_in_it(tmp_path: Path) -> None:
    for format in ("peft", "mlx", "merged"):
        assert str(REPOSITORY) not in card(format)
    moved = replace(ORIGIN, subject=None)
    text = model_card(moved, Written("peft", "x", []))
    assert "## Training procedure" not in text
    assert "federated learning," not in text  # nobody knows how this adapter was trained
    assert "by federated learning," in card("peft")


def test_a_base_on_the_hub_is_linked() -> None:
    adapter = replace(ORIGIN.adapter, config={"base_model_name_or_path": "some/base"})
    text = model_card(replace(ORIGIN, subject=None, adapter=adapter), Written("peft", "x", []))
    fields = yaml.safe_load(text.split("---\n")[1])
    assert fields["base_model"] == "some/base"
    assert "base_model:adapter:some/base" in fields["tags"]
    assert "[some/base](https://huggingface.co/some/base)" in text
    assert 'from_pretrained("some/base")' in text


def test_a_long_run_shows_some_rounds_and_the_last() -> None:
    lines = [
        {"event": "round", "round": i, "evaluation": {"loss": 1.0 / (i + 1), "accuracy": None}}
        for i in range(100)
    ]
    rows = _evaluations(lines).splitlines()[2:]
    assert len(rows) <= MOST_ROUNDS + 1
    assert rows[0].startswith("| 0 |")
    assert rows[-1] == "| 99 | 0.0100 |"
    assert _evaluations([{"event": "round", "round": 1}]) == ""


def test_it_says_that_clients_trained_beside_a_quantised_base() -> None:
    assert ORIGIN.subject is not None
    assert " bits" not in card("peft")
    config = ORIGIN.subject.config.model_copy(update={"load_in_4bit": True})
    quantised = replace(ORIGIN, subject=replace(ORIGIN.subject, config=config))
    text = model_card(quantised, Written("merged", "me/model", ["rank 7"]))
    assert "- trained beside the base in 4 bits; here the base is as it was saved\n" in text
