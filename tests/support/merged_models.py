"""Merges an adapter into its base and loads what comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedlora.adapters.export.checkpoint import open_checkpoint
from fedlora.adapters.export.merged import (
    MergePlan,
    largest_difference,
    plan_merge,
    write_merged,
)
from fedlora.adapters.saved_adapter import load_adapter
from fedlora.model.loading import load_pretrained
from fedlora.model.sources import find_source
from support.merging import logits
from support.models import LLAMA


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose output layer is its embedding, in two files."""
    path = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA, tie_word_embeddings=True, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="20KB")
    return path


def plan(base: Path, adapter: Path, dtype: torch.dtype | None = None, labels: int = 0) -> MergePlan:
    source, held = find_source(str(base)), load_adapter(adapter)
    names = [str(i) for i in range(labels)]
    skeleton, _ = load_pretrained(source, "float32", 0, names, weights=False)
    return plan_merge(skeleton, open_checkpoint(source), held, held.deltas, dtype)


def merge(
    base: Path, adapter: Path, output: Path, dtype: torch.dtype | None = None, labels: int = 0
) -> MergePlan:
    """Merge, with the configuration that belongs to it."""
    made = plan(base, adapter, dtype, labels)
    output.mkdir()
    files = write_merged(output, made, 10**5)
    assert largest_difference(files, made) <= 1
    config = json.loads((base / "config.json").read_text())
    if made.untied:
        config["tie_word_embeddings"] = False
    if labels:
        config["id2label"] = {str(i): str(i) for i in range(labels)}
        config["pad_token_id"] = 0
    (output / "config.json").write_text(json.dumps(config))
    return made


def same_logits(found: Any, wanted: Any, bound: float = 1e-5) -> None:
    one, other = logits(found), logits(wanted)
    assert float((one - other).abs().max()) <= bound * float(other.abs().max())


def causal(path: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model
