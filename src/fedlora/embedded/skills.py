"""Makes prompts and answers of ten string skills, in a symbolic form and in words.

The symbolic form (``reverse abc>`` -> ``cba``) is what the embedded base model is trained on, half
of the time with random words next to the keyword. The instruction form (``write backwards abc>`` ->
``cba``) asks for the same skills in wording the base has never seen, so that fine-tuning has to
connect a phrase with a skill rather than learn the skill itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import numpy as np

__all__ = ["PROMPT_END", "SKILLS", "Skill", "Split", "instructions", "split_of", "symbolic"]

Split = Literal["train", "eval"]

PROMPT_END: Final = ">"
"""The character that closes every prompt; it occurs nowhere else in a row."""

_VOWELS: Final = "aeiou"
_CONSONANTS: Final = "bcdfghjklmnpqrstvwxyz"
_MIN_LETTERS: Final = 3
_MAX_LETTERS: Final = 6
# Above the 5/26 of uniform letters, so that dropping the vowels usually changes several places.
_VOWEL_SHARE: Final = 0.35
# One string in this many belongs to the evaluation split.
_EVAL_ONE_IN: Final = 5
# Separate random streams for the two forms, so that equal seeds do not give equal strings.
_SYMBOLIC_STREAM: Final = 0
_INSTRUCTION_STREAM: Final = 1


@dataclass(frozen=True, slots=True)
class Skill:
    """One string transformation and the ways to ask for it.

    Attributes:
        name: The keyword of the symbolic form, a single lower-case word.
        apply: Maps a lower-case string to the expected completion.
        phrasings: Instruction templates; ``{}`` stands for the string.
    """

    name: str
    apply: Callable[[str], str]
    phrasings: tuple[str, ...]

    def symbolic_prompt(self, text: str) -> str:
        """Return the prompt in the base model's own form, such as ``reverse abc>``."""
        return f"{self.name} {text}{PROMPT_END}"

    def instruction_prompt(self, text: str, phrasing: int) -> str:
        """Return the prompt in words, using the template with index `phrasing`."""
        return self.phrasings[phrasing].format(text) + PROMPT_END


def _double(text: str) -> str:
    return "".join(letter * 2 for letter in text)


def _drop_vowels(text: str) -> str:
    return "".join(letter for letter in text if letter not in _VOWELS)


def _next_letter(text: str) -> str:
    return "".join("a" if letter == "z" else chr(ord(letter) + 1) for letter in text)


def _swap_ends(text: str) -> str:
    return text if len(text) < 2 else text[-1] + text[1:-1] + text[0]


# No phrasing contains the keyword of any skill: the untuned base must not recognise one. The string
# comes last, as in the symbolic form: fine-tuning then needs to learn what is asked for, not where
# in the sentence to look.
_ALL_SKILLS: Final = (
    Skill("reverse", lambda s: s[::-1], ("write backwards {}", "spell from end to start {}")),
    Skill(
        "sort",
        lambda s: "".join(sorted(s)),
        ("put in alphabetical order {}", "arrange the letters of {}"),
    ),
    Skill("upper", str.upper, ("write in capitals {}", "make big letters of {}")),
    Skill("double", _double, ("say each letter twice {}", "repeat every letter of {}")),
    Skill("drop", _drop_vowels, ("remove the vowels from {}", "keep only the consonants of {}")),
    Skill("next", _next_letter, ("move up the alphabet {}", "shift by one the letters of {}")),
    Skill("first", lambda s: s[0], ("give the initial of {}", "which letter opens {}")),
    Skill("last", lambda s: s[-1], ("give the final letter of {}", "which letter closes {}")),
    Skill("length", lambda s: str(len(s)), ("count the letters in {}", "tell the size of {}")),
    Skill("swap", _swap_ends, ("trade both ends of {}", "exchange the outer letters of {}")),
)

SKILLS: Final[Mapping[str, Skill]] = MappingProxyType({skill.name: skill for skill in _ALL_SKILLS})
"""The ten skills by name, in a fixed order; read-only."""


def split_of(text: str) -> Split:
    """Return the split that a string belongs to, about one in five to ``"eval"``.

    The answer depends on the CRC-32 of the string alone: it is the same in every process and on
    every machine (unlike the built-in ``hash``), and no string is ever in both splits.
    """
    return "eval" if zlib.crc32(text.encode("utf-8")) % _EVAL_ONE_IN == 0 else "train"


def instructions(num_rows: int, seed: int, split: Split) -> list[dict[str, str]]:
    """Make rows that ask for the skills in words.

    The skills, and the phrasings of each, are balanced to within one row and then shuffled. The
    strings have 3 to 6 lower-case letters with at least one vowel and one consonant, so that no
    completion is empty. Strings of the two splits are disjoint by construction, for all seeds and
    sizes and also with respect to `symbolic`: a stable hash of the string alone (CRC-32, see
    `split_of`) decides which split it belongs to. Equal arguments give equal rows on any machine;
    within one call a string may occur more than once.

    Args:
        num_rows: Number of rows, at least 0.
        seed: Seed of the random generator, at least 0.
        split: ``"train"`` or ``"eval"``.

    Returns:
        `num_rows` dictionaries with the keys ``prompt``, ``completion`` and ``skill``; prompt and
        completion are to be joined without a separator.

    Raises:
        ValueError: If an argument is out of range.
    """
    rows: list[dict[str, str]] = []
    for index, (skill, text) in enumerate(_draw(num_rows, seed, split, _INSTRUCTION_STREAM)):
        phrasing = index // len(SKILLS) % len(skill.phrasings)
        rows.append(_row(skill, text, skill.instruction_prompt(text, phrasing)))
    return _shuffled(rows, seed, split, _INSTRUCTION_STREAM)


def symbolic(num_rows: int, seed: int, split: Split) -> list[dict[str, str]]:
    """Make rows in the symbolic form that the embedded base model is trained on.

    Arguments, result, balance and splits are those of `instructions`; the random strings for an
    equal seed are different ones.
    """
    rows = [
        _row(skill, text, skill.symbolic_prompt(text))
        for skill, text in _draw(num_rows, seed, split, _SYMBOLIC_STREAM)
    ]
    return _shuffled(rows, seed, split, _SYMBOLIC_STREAM)


def _row(skill: Skill, text: str, prompt: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": skill.apply(text), "skill": skill.name}


def _draw(num_rows: int, seed: int, split: Split, stream: int) -> list[tuple[Skill, str]]:
    """Return `num_rows` pairs of skill and string, the skills taking turns."""
    if num_rows < 0:
        raise ValueError(f"num_rows must be at least 0, got {num_rows}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}")
    rng = np.random.default_rng([seed, stream, int(split == "eval"), 0])
    skills = list(SKILLS.values())
    return [(skills[index % len(skills)], _text(rng, split)) for index in range(num_rows)]


def _text(rng: np.random.Generator, split: Split) -> str:
    """Draw strings until one belongs to `split` and has both a vowel and a consonant."""
    while True:
        length = int(rng.integers(_MIN_LETTERS, _MAX_LETTERS + 1))
        text = "".join(
            letters[int(rng.integers(len(letters)))]
            for letters in np.where(rng.random(length) < _VOWEL_SHARE, _VOWELS, _CONSONANTS)
        )
        num_vowels = sum(letter in _VOWELS for letter in text)
        if 0 < num_vowels < length and split_of(text) == split:
            return text


def _shuffled(
    rows: list[dict[str, str]], seed: int, split: Split, stream: int
) -> list[dict[str, str]]:
    # A generator of its own keeps the order independent of how many draws the strings took.
    rng = np.random.default_rng([seed, stream, int(split == "eval"), 1])
    return [rows[int(index)] for index in rng.permutation(len(rows))]
