"""Exports from an adapter whose base is not here: the table, and files compared by weights."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedlora.adapters.aggregate import save_adapter
from fedlora.adapters.saved_adapter import load_adapter
from fedlora.commands.export.request import read_request
from fedlora.commands.export.work import export
from fedlora.errors import CheckpointError, InputError
from support.merging import made

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def lone(tmp_path: Path) -> Path:
    """An adapter of rank 20 whose base is nowhere."""
    adapter = made({NAME: ((40, 30), 20)}, base_model_name_or_path="./gone")
    save_adapter(tmp_path / "lone", adapter)
    return tmp_path / "lone"


def told(*words: object) -> list[dict[str, Any]]:
    lines: list[Any] = []
    export(read_request([str(word) for word in words]), Console(file=io.StringIO()), lines.append)
    return lines


def test_the_table_alone(lone: Path) -> None:
    table, note = told(lone)
    assert note["event"] == "note"
    assert table["event"] == "ranks"
    assert [row["rank"] for row in table["ranks"]] == [8, 16, 20]
    assert table["measured_on"] is None
    out = io.StringIO()
    export(read_request([str(lone)]), Console(file=out, width=200))
    text = out.getvalue()
    assert "no losses and no logits, for the base is not here" in text
    assert f"fedlora export {lone} --format peft --for vllm --output DIR" in text


def test_a_rank_that_vllm_does_not_serve_is_shown_but_not_written(tmp_path: Path) -> None:
    adapter = made({NAME: ((600, 520), 515)}, base_model_name_or_path="./gone")
    save_adapter(tmp_path / "wide", adapter)
    table, _ = told(tmp_path / "wide", "--for", "vllm")
    assert table["rank"] == 515
    words = [tmp_path / "wide", "--for", "vllm", "--format", "peft", "--output", tmp_path / "out"]
    with pytest.raises(InputError, match="has rank 515, and vLLM serves 512 at most"):
        told(*words)
    *_, done = told(*words, "--rank", 512)
    assert (done["rank"], done["error"] > 0) == (512, True)


def test_what_is_written_says_how_it_was_compared(lone: Path, tmp_path: Path) -> None:
    *_, done = told(lone, "--format", "peft", "--for", "vllm", "--output", tmp_path / "out")
    assert (done["event"], done["rank"], done["compared_by"]) == ("export", 32, "weights")
    assert "--max-lora-rank 32" in done["commands"][0]
    assert {x["path"] for x in done["files"]} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert load_adapter(tmp_path / "out").deltas[NAME].rank == 32


def test_what_needs_the_base_is_refused(lone: Path, tmp_path: Path) -> None:
    for words in (["--format", "merged"], ["--format", "peft", "--check", "logits"]):
        with pytest.raises(InputError, match=r"gone.*--base names another base model"):
            told(lone, *words, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_comparison_leaves_nothing(
    lone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedlora.commands.export.files as files

    def spoilt(path: Path) -> Any:
        back = load_adapter(path)
        back.deltas[NAME].B.mul_(1.5)
        return back

    monkeypatch.setattr(files, "load_adapter", spoilt)
    with pytest.raises(CheckpointError, match=r"not the model it came from; .*meant: 5\.0e-01"):
        told(lone, "--format", "peft", "--output", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lone"]


def test_a_dry_run_lists_what_would_be_uploaded(lone: Path, tmp_path: Path) -> None:
    words = ["--format", "peft", "--output", tmp_path / "out", "--push_to_hub", "me/x", "--dry_run"]
    *_, pushed = told(lone, *words)
    assert (pushed["event"], pushed["repo"], pushed["private"]) == ("push", "me/x", True)
    assert "adapter_model.safetensors" in [file["path"] for file in pushed["files"]]
    with pytest.raises(InputError, match="--push_to_hub: a/b/c"):
        told(lone, *words[:5], "a/b/c", "--overwrite")
