"""Which numbers of a model's configuration may be lengths."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig, MistralConfig

from fedlora.model.config_lengths import (
    UNBOUNDED,
    longest_table,
    positions_of,
    smallest_unexplained,
)

MODEL = nn.Linear(48, 96, bias=False)
"""A model whose widths are 48 and 96."""


def unexplained(windows: set[int] | None = None, **config: object) -> int:
    """Of a configuration of these keys alone."""
    return smallest_unexplained(MODEL, [config], windows or set())


def test_tables_of_positions() -> None:
    assert longest_table(LlamaConfig(max_position_embeddings=2048)) == 2048
    assert longest_table(GPT2Config(n_positions=1024)) == 1024
    assert longest_table(SimpleNamespace(hidden_size=64)) == 0
    scaled = LlamaConfig(
        max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 512,
            "short_factor": [1.0] * 64,
            "long_factor": [1.0] * 64,
        },
    )
    assert {512, 4096} <= set(positions_of(scaled))


def test_a_window_is_a_length_unless_the_model_has_told_of_it() -> None:
    config = MistralConfig(sliding_window=4096)
    assert smallest_unexplained(MODEL, [config], set()) == 4096
    assert smallest_unexplained(MODEL, [config], {4096}) == UNBOUNDED
    assert unexplained({512}, chunk_size=1024) == UNBOUNDED  # twice a window
    assert unexplained({512}, chunk_size=2048) == 2048


def test_what_is_known_to_be_something_else() -> None:
    assert unexplained(hidden_size=333, vocab_size=500, num_layers=40, bos_token_id=99) == UNBOUNDED
    assert unexplained(mystery=96) == UNBOUNDED  # a parameter has that width
    assert unexplained(mystery=97) == 97
    assert unexplained(mystery=12) == UNBOUNDED  # tried anyway
    assert unexplained(nested={"far": [77, 500]}, flag=True, share=0.5) == 77


def test_no_number_is_a_length_by_chance_of_its_type() -> None:
    values = (float("inf"), float("nan"), 2**70, -200, "300", torch.float32, None)
    assert all(unexplained(mystery=value) == UNBOUNDED for value in values)
    assert unexplained(mystery=300.0) == 300
