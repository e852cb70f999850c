"""Ships the embedded experiment: ten string skills and a tiny causal language model.

Everything needed for a real federated fine-tuning run ships inside the package, so the demo and
the tests work without a network. `BASE_DIR` is a Hugging Face model directory (a Llama of about
0.8 million parameters with a character-level tokenizer) that solves the skills in their symbolic
form, ``reverse abc>``, and practically none of them when they are asked for in words,
``write backwards abc>``. `instructions` makes rows of the second kind: the data to fine-tune on.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedlora.embedded.skills import instructions

__all__ = ["BASE_DIR", "CONFIG", "EMBEDDED", "instructions"]

EMBEDDED: Final = "embedded"
"""What a configuration says to get the model, the data set or the configuration of this package."""

CONFIG: Final[Path] = Path(__file__).resolve().parent / "config.yaml"
"""The embedded default: what `fedlora run` runs without a configuration."""

BASE_DIR: Final[Path] = Path(__file__).resolve().parent / "base"
"""Directory of the embedded base model and its tokenizer, for ``from_pretrained``."""
