"""Keeps a conversation with a model, within its context, and answers word by word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedlora.client.generation import stream
from fedlora.commands.eval.asking import Asker, prompt_format_of
from fedlora.commands.eval.subject import Subject

Turn = dict[str, str]


_ALONE = ("custom", "text", "prompt_completion", "preference", "auto")
"""Templates of single prompts, where the tokenizer has no chat template; auto: of no run."""


@dataclass(frozen=True)
class Style:
    """How a model is talked to.

    Args:
        tokens: turns of system, user and assistant -> tokens up to the assistant's next words.
        name: in words.
        remembers: earlier turns are part of what it reads.
    """

    tokens: Callable[[list[Turn]], list[int]]
    name: str
    remembers: bool = True


def style_of(subject: Subject, tokenizer: Any, chat_asked_for: bool = False) -> Style:
    """How this model is talked to.

    A chat template or Alpaca's prompt holds whole conversations. A run that was trained on prompts
    and completions, on text, or on a template of its own is asked every message by itself, in the
    form that it was trained on.

    Args:
        subject: the model, and what it was trained on.
        tokenizer: its tokenizer.
        chat_asked_for: the user names a chat template, which goes before all.
    """
    chats = bool(getattr(tokenizer, "chat_template", None))
    trained = subject.config.template if subject.of_a_run else "auto"
    alone = ("custom", "text") if chats or chat_asked_for else _ALONE
    if trained in alone and not chat_asked_for:
        asker = Asker(subject, tokenizer)
        form = "in the run's own template" if trained == "custom" else "as it stands"
        return Style(
            lambda turns: list(asker.text(turns[-1]["content"]).ids),
            f"each message by itself, {form}",
            remembers=False,
        )
    chosen = prompt_format_of(subject, tokenizer, chat_asked_for)
    return Style(chosen.tokens, chosen.name)


@dataclass
class Conversation:
    """What was said, and what answers.

    Args:
        model: of transformers, ready to answer.
        tokenizer: the model's.
        style: how it is talked to.
        context: tokens that the model can read and write together.
        max_new_tokens: of the longest answer.
        system: what stands before all turns; "": nothing.
        temperature: of the draws; 0: the likeliest token each time.
        turns: what was said.
        forgotten: turns that no longer fit.
    """

    model: Any
    tokenizer: Any
    style: Style
    context: int
    max_new_tokens: int
    system: str = ""
    temperature: float = 0.0
    turns: list[Turn] = field(default_factory=list)
    forgotten: int = 0

    def reset(self) -> None:
        """Begin anew."""
        self.turns.clear()
        self.forgotten = 0

    def answer(self, message: str, tell: Callable[[str], None]) -> str:
        """Answer a message, telling the words as they come, and remember both.

        What was told before an interruption is remembered as the answer.

        Args:
            message: the user's.
            tell: is given the answer piece by piece.

        Raises:
            InputError: the chat template refuses it; the message is not remembered.
        """
        before = list(self.turns)
        self.turns.append({"role": "user", "content": message})
        try:
            prompt = self._prompt()
        except Exception:
            self.turns[:] = before
            raise
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            tell(piece)

        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {}
        new = max(1, min(self.max_new_tokens, self.context - len(prompt)))
        try:
            stream(self.model, self.tokenizer, prompt, new, keep, **sampling)
        finally:
            self.turns.append({"role": "assistant", "content": "".join(pieces)})
        return "".join(pieces)

    def _prompt(self) -> list[int]:
        """The tokens of the newest turns that leave room for an answer."""
        room = max(self.context - self.max_new_tokens, self.context // 2, 1)
        while True:
            ids = self.style.tokens(self._shown())
            if len(ids) <= room or len(self.turns) < 3 or not self.style.remembers:
                return ids[-room:]
            del self.turns[:2]
            self.forgotten += 2

    def _shown(self) -> list[Turn]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]
