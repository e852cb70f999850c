"""Prints sentences as they are, to a terminal or a file."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print a sentence: no markup, no colours, no line ends that a file would keep."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
