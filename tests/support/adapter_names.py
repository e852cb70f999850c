"""Makes tiny models and adapters of PEFT whose keys can be spelt otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedlora.adapters.saved_adapter import WEIGHTS_NAME
from support.merging import randomise
from support.models import LLAMA


def llama(**more: Any) -> Any:
    """A random Llama, the same every time."""
    if more:
        return _llama(**more)
    return copy.deepcopy(_plain_llama())


def _llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **more)).eval()


_plain_llama = cache(_llama)


def saved(path: Path, model: Any, seed: int, **options: Any) -> Path:
    """An adapter PEFT wrote."""
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(model, LoraConfig(**options))
    randomise(model, seed)
    model.save_pretrained(path, save_embedding_layers=False)
    return path


def respelt(path: Path, change: Callable[[str], str]) -> Path:
    """The same directory with other keys."""
    tensors = load_file(path / WEIGHTS_NAME)
    changed = {change(key): value for key, value in tensors.items()}
    assert changed.keys() != tensors.keys()
    save_file(changed, path / WEIGHTS_NAME)
    return path


TEXT = {**LLAMA, "head_dim": 8, "max_position_embeddings": 64}


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def multimodal(kind: str) -> Any:
    """A tiny model of text and pictures."""
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32}
    values: dict[str, Any] = {
        "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
        "llava": {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
        "qwen2_vl": {
            "text_config": {
                **TEXT,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            },
            "vision_config": vision,
        },
    }
    config = AutoConfig.for_model(kind, **values[kind])
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


OLD: dict[str, Callable[[str], str]] = {
    "gemma3": lambda k: k.replace("model.language_model.layers", "language_model.model.layers"),
    "llava": lambda k: k.replace("model.language_model.layers", "language_model.model.layers"),
    "qwen2_vl": lambda k: k.replace("model.language_model.layers", "model.layers"),
}


LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"
