"""What a site has is counted before any run, without reading a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import InputError
from fedlora.runs.site_check import check_site, measure_site
from support.one_site import made_site
from support.rows import rows, write_jsonl


def table(directory: Path, values: list[dict[str, Any]]) -> str:
    return str(write_jsonl(directory / "rows.jsonl", values))


def test_rows_held_out_rows_and_modules_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    too_long = {"prompt": "x" * 40, "completion": "y"}
    path, bounds = table(tmp_path, [*rows(12), too_long]), {"max_length": 24}
    site = made_site(tmp_path / "at", tiny_llama, path, client_eval_fraction=0.25, bounds=bounds)
    check = check_site(site)
    assert (check.rows, check.train_rows, check.eval_rows) == (13, 9, 3)
    assert sum(check.dropped.values()) == 1
    assert (check.architecture, check.modules) == ("LlamaForCausalLM", 14)
    assert check.tokens
    assert check.tokens > 9


def test_labels_that_the_rows_show(tiny_llama: Path, tmp_path: Path) -> None:
    labelled = [{"text": row["prompt"], "label": row["kind"]} for row in rows(8)]
    site = made_site(tmp_path / "at", tiny_llama, table(tmp_path, labelled), template="auto",
                     label_column_name="label", text_column_names=["text"])  # fmt: skip
    assert check_site(site).labels == tuple(sorted({row["kind"] for row in rows(8)}))


def test_modules_that_the_site_allows_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    bounds = {"lora_target_modules": ["q_proj"]}
    site = made_site(tmp_path / "at", tiny_llama, table(tmp_path, rows(4)), bounds=bounds)
    assert check_site(site).modules == 2


def test_without_a_model_rows_are_read_alone(tiny_llama: Path, tmp_path: Path) -> None:
    site = made_site(tmp_path / "at", tiny_llama, table(tmp_path, rows(4)))
    settings = {key: x for key, x in site.settings.items() if key != "model_name_or_path"}
    check = check_site(site.model_copy(update={"settings": settings}))
    assert (check.rows, check.train_rows) == (4, None)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train_file": "/nowhere/rows.jsonl"}, "train_file: "),
        ({"model_name_or_path": "/nowhere/base"}, "model_name_or_path"),
        ({"template": "alpaca"}, "template"),
    ],
)
def test_what_cannot_be_used_is_said(
    keys: dict[str, Any], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    site = made_site(tmp_path / "at", tiny_llama, table(tmp_path, rows(4)))
    site = site.model_copy(update={"settings": {**site.settings, **keys}})
    with pytest.raises(InputError, match=said):
        check_site(site)


def test_the_largest_run_that_a_site_grants_is_measured(tiny_llama: Path, tmp_path: Path) -> None:
    path = table(tmp_path, rows(12))
    need = measure_site(made_site(tmp_path / "a", tiny_llama, path, bounds={"lora_r": 8}))
    assert (need.rank, len(need.base)) == (8, 64)
    assert need.available > need.memory
    less = measure_site(made_site(tmp_path / "b", tiny_llama, path, rank=2, bounds={"lora_r": 8}))
    assert (less.rank, less.base) == (2, need.base)
    assert less.memory < need.memory
