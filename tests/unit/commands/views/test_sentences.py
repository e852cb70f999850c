"""Sentences are printed as they are."""

from __future__ import annotations

import io

from rich.console import Console

from fedlora.commands.views.sentences import say


def said(text: str, **how: object) -> str:
    """What stands on a console of 20 columns."""
    console = Console(file=io.StringIO(), width=20, **how)  # type: ignore[arg-type]
    say(console, text)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_nothing_is_taken_for_markup_and_no_line_is_broken() -> None:
    text = "a path [bold]x[/bold] of 12,345 rows that is longer than the console"
    assert said(text) == f"{text}\n"
    assert said(text, force_terminal=True, color_system="truecolor") == f"{text}\n"
