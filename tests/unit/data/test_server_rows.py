"""The rows that a server evaluates on."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fedlora.config.config import Config
from fedlora.data.datasets import load_data
from fedlora.data.server_rows import load_server_rows
from fedlora.errors import InputError


def test_they_are_those_of_a_run_in_one_process(tiny_llama: Path, site_files: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    keys = {"eval_file": str(site_files / "eval.jsonl"), "max_eval_samples": 4, "num_threads": 1}
    rows = load_server_rows(Config(**keys), tokenizer, ())
    whole = load_data(Config(**keys, train_file=str(site_files / "site_*.jsonl")), tokenizer)
    assert list(rows.eval) == list(whole.eval)
    assert rows.clients == ()
    assert rows.template == whole.template


def test_without_a_file_there_are_none(tiny_llama: Path) -> None:
    rows = load_server_rows(Config(), None, ("no", "yes"))
    assert (list(rows.eval), rows.label_names) == ([], ("no", "yes"))


def test_a_complaint_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="eval_file: "):
        load_server_rows(Config(eval_file=str(tmp_path / "none.jsonl")), None, ())
