"""Makes tiny classifiers and the rows they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import fedlora
from fedlora.runs.session import Session, assemble
from support.architectures import COMMON, GROUPED, keys_of, labelled_rows, save_model
from support.models import save_tokenizer
from support.rows import rows, write_jsonl

WEIGHTS = "adapter_model.safetensors"


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT as published ones are: with a pooler, without a classifier; no dropout."""
    path = tmp_path_factory.mktemp("models") / "bert"
    return save_model(path, hf.BertConfig(**COMMON, **STILL), hf.BertModel)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model, its output head apart from the embeddings."""
    path = tmp_path_factory.mktemp("models") / "llama"
    return save_model(path, hf.LlamaConfig(**GROUPED))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients' rows of three labels, and held-out ones."""
    path = tmp_path_factory.mktemp("data")
    for site, number in enumerate((11, 7)):
        write_jsonl(path / f"label_{site}.jsonl", labelled_rows(number, 11 * site))
        write_jsonl(path / f"text_{site}.jsonl", rows(number, 11 * site))
    write_jsonl(path / "eval_label.jsonl", labelled_rows(8, 1000))
    write_jsonl(path / "eval_text.jsonl", rows(5, 1000))
    return path


def sites(path: Path, *parts: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> Path:
    """A directory of data as `keys_of` reads it."""
    path.mkdir()
    for site, part in enumerate(parts):
        write_jsonl(path / f"label_{site}.jsonl", part)
    write_jsonl(path / "eval_label.jsonl", held_out)
    return path


def classifier_of(bert: Path, path: Path, labels: Sequence[str]) -> Path:
    """A checkpoint that has a head for these labels already."""
    config = hf.AutoConfig.from_pretrained(bert)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    torch.manual_seed(3)
    model = hf.AutoModelForSequenceClassification.from_pretrained(bert, config=config)
    with torch.no_grad():
        model.classifier.weight.normal_()
        model.classifier.bias.normal_()
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def session_of(model: Path, data: Path, out: Path, **more: Any) -> Session:
    return assemble(fedlora.Config(**keys_of(model, data, out, True, **more)))
