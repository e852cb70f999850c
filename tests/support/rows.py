"""Makes rows, and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows(number: int, offset: int = 0) -> list[dict[str, str]]:
    """Prompts that ask for a word backwards."""
    words = ["stone", "river", "cloud", "amber", "fig", "oak", "lantern", "moss", "quill", "tide"]
    out = []
    for i in range(offset, offset + number):
        word = words[i % len(words)] + words[(i // len(words) + i) % len(words)][:2]
        out.append({"prompt": f"{word}>", "completion": word[::-1], "kind": word[0]})
    return out


def write_jsonl(path: Path, values: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path
