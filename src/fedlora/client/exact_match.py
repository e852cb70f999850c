"""Counts the turns whose greedy answer has the text of their reference.

A loss pass has computed, at every token of a reference, the likeliest token after the true ones
before it. Greedy generation begins with the same tokens. So a turn whose likeliest tokens are those
of its reference is answered with it, and one whose first other token makes another text is not:
nothing has to be generated for either. Only a turn that is open after that is generated: a token
that shows nothing, such as white space, or a reference longer than an answer may be.

Where two tokens are equally likely up to rounding, either may be taken for the likeliest one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.client.generation import Ends, answers, ends_of, specials_of, text_of
from fedlora.data.tokenize import IGNORE, Tokens


@dataclass(frozen=True)
class Turn:
    """An answer in the data, and what it answers.

    Args:
        prompt: all tokens before it.
        reference: its tokens, with the end of the turn where that is learnt.
    """

    prompt: Sequence[int]
    reference: Sequence[int]


def turns_of(row: Tokens) -> list[Turn]:
    """The turns of a row: every run of labelled tokens, with all tokens before it as its prompt."""
    ids, labels, turns = row["input_ids"], row["labels"], []
    learnt = [label != IGNORE for label in labels]
    begins = [i for i, x in enumerate(learnt) if x and not (i and learnt[i - 1])]
    for begin in begins:
        end = next((i for i in range(begin, len(ids)) if not learnt[i]), len(ids))
        turns.append(Turn(ids[:begin], ids[begin:end]))
    return turns


def guesses_by_turn(
    rows: Sequence[Tokens], guesses: Sequence[int]
) -> list[tuple[Turn, Sequence[int] | None]]:
    """Every turn of the rows with the likeliest token at each place of its reference.

    Args:
        rows: tokenised.
        guesses: the likeliest tokens at all labelled places of the rows, in their order.

    Returns:
        None instead of the tokens of a turn without a prompt: nothing predicts its first token.
    """
    pairs: list[tuple[Turn, Sequence[int] | None]] = []
    begin = 0
    for turn in (turn for row in rows for turn in turns_of(row)):
        end = begin + len(turn.reference) - (not turn.prompt)
        pairs.append((turn, guesses[begin:end] if turn.prompt else None))
        begin = end
    return pairs


def exact_matches(
    model: Any,
    tokenizer: Any,
    turns: Sequence[tuple[Turn, Sequence[int] | None]],
    batch_size: int,
    max_new_tokens: int,
) -> int:
    """How many turns are answered with the text of their reference, ignoring outer white space.

    An answer is the text before the end of its turn. Where the reference has no end (the template
    does not train one, or the row was cut), as many tokens are compared as the reference has.

    Args:
        model: of transformers, whose own settings change nothing of what is likeliest
            (`loading.greedy`).
        tokenizer: the model's.
        turns: each with its likeliest tokens (`guesses_by_turn`); with None it is generated.
        batch_size: turns generated at once.
        max_new_tokens: longest answer.
    """
    ends, specials = ends_of(model, tokenizer), specials_of(tokenizer)
    matches, undecided = 0, list[_Question]()
    for turn, guesses in turns:
        question = _Question(turn, *_ends_of_reference(turn.reference, ends, tokenizer, specials))
        known = _foreseen(question, guesses, tokenizer, max_new_tokens)
        if known is None:
            undecided.append(question)
        matches += known is True
    undecided.sort(key=lambda question: len(question.turn.prompt))
    for begin in range(0, len(undecided), batch_size):
        batch = undecided[begin : begin + batch_size]
        prompts, stops = [x.turn.prompt for x in batch], [x.ends for x in batch]
        tokens = answers(model, tokenizer, prompts, max_new_tokens, stops)
        matches += sum(x.answered_by(ids, tokenizer) for x, ids in zip(batch, tokens, strict=True))
    return matches


@dataclass(frozen=True)
class _Question:
    """A turn to be answered.

    Args:
        turn: of the data.
        ends: what ends the answer.
        has_end: whether the reference itself has an end.
    """

    turn: Turn
    ends: Ends
    has_end: bool

    def wanted(self, tokenizer: Any) -> str:
        """The text of the reference."""
        return text_of(self.turn.reference, self.ends, tokenizer)

    def answered_by(self, ids: Sequence[int], tokenizer: Any) -> bool:
        """Whether these tokens are a right answer."""
        answer = ids if self.has_end else ids[: len(self.turn.reference)]
        return text_of(answer, self.ends, tokenizer) == self.wanted(tokenizer)


def _ends_of_reference(
    reference: Sequence[int], ends: Ends, tokenizer: Any, specials: Collection[int]
) -> tuple[Ends, bool]:
    """What ends the answer to this turn, and whether the reference itself has an end.

    Special tokens inside the reference (the end of a thought or of a tool call) do not end it.
    """
    inside = len(reference)
    while inside and (
        reference[inside - 1] in specials or not tokenizer.decode([reference[inside - 1]]).strip()
    ):
        inside -= 1
    closing = [i for i in reference[inside:] if i in specials]
    ids = {*ends.ids, *closing[:1]} - set(reference[:inside])
    text = tokenizer.decode(list(reference), skip_special_tokens=True).rstrip()
    written = bool(ends.text) and text.endswith(ends.text)
    return Ends(frozenset(ids), ends.text if written else ""), bool(closing) or written


# --- what a loss pass tells of an answer ---


def _foreseen(
    question: _Question, guesses: Sequence[int] | None, tokenizer: Any, max_new_tokens: int
) -> bool | None:
    """Whether the answer is right, as far as the likeliest tokens tell; None: it is open.

    Args:
        question: with its reference.
        guesses: the likeliest token at every place of the reference; None: they are not known.
        tokenizer: of transformers.
        max_new_tokens: longest answer.
    """
    reference, ends = question.turn.reference, question.ends
    if guesses is None or len(reference) > max_new_tokens:
        return None
    pairs = enumerate(zip(guesses, reference, strict=True))
    first = next((i for i, (guess, token) in pairs if guess != token), None)
    if first is None:
        return True
    begun = [*reference[:first], guesses[first]]
    text = tokenizer.decode(begun, skip_special_tokens=True)
    if not ends.ids.isdisjoint(begun) or (ends.text and ends.text in text):  # the answer ends here
        return question.answered_by(begun, tokenizer)
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return None  # what follows may change the text before it ("do not" becomes "don't")
    # White space is left out, since it may depend on what follows, and so is the replacement
    # character, which stands for a letter whose bytes are not all there yet.
    begins = "".join(text.rstrip("\ufffd").split())
    whole = "".join((question.wanted(tokenizer) + ends.text).split())
    return None if whole.startswith(begins) else False
