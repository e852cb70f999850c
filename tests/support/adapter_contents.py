"""Writes adapters as PEFT does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model

from support.merging import randomise


def saved(path: Path, model: Any, seed: int, **options: Any) -> Path:
    """A directory as PEFT writes it, all its own decisions about embeddings included."""
    options = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], **options}
    model = get_peft_model(model, LoraConfig(**options))
    randomise(model, seed)
    model.save_pretrained(path)
    return path
