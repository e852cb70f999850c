"""Loads models, saves a tokenizer of single characters, and gives layers their adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""The sizes of a small model."""

LLAMA: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
"""The sizes of a small Llama with grouped-query attention."""

TOKENS: dict[str, Any] = {
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""The context and the special tokens of a small model."""


def save_tokenizer(path: Path) -> None:
    """A character-level tokenizer over printable ASCII."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", "</s>", "<unk>", *(chr(c) for c in range(32, 127)), "\n"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(path)


def load_base(name: str, *, target_modules: Any, weights: bool = True, **keys: Any) -> Any:
    """A causal model with adapter layers, as a run loads it."""
    from fedlora.config.config import Config
    from fedlora.model.loading import load_model
    from fedlora.model.sources import find_source, load_tokenizer

    config = Config(model_name_or_path=name, lora_target_modules=target_modules, **keys)
    source = find_source(name)
    tokenizer = load_tokenizer(source, config.tokenizer_name)
    return load_model(source, tokenizer, config, weights=weights)[0]


def give(layer: Any, frozen: Any, adapter: Any, scale: float = 1.0, dropout: float = 0.0) -> None:
    """One client's adapter into a single layer, and what lies frozen beside it."""
    from fedlora.model.lora_layer import ClientAdapter

    layer.freeze(frozen)
    layer.load_clients(
        "it", [] if adapter is None else [ClientAdapter({"it": adapter}, {}, scale, dropout)]
    )
