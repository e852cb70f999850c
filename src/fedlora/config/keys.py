"""Names the marks that a configuration key carries where it is declared, and finds keys by them.

A field of `Config` carries its marks in its annotation, beside its type:

    train_file: Annotated[str | None, Mark.FILE, Mark.ABSOLUTE] = Field(None, description="...")

Who needs all keys of a kind (a client's own, paths, automatic ones) asks for the mark, so that no
second list has to be kept in step with the fields.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel

T = TypeVar("T")
Schema = dict[str, Any]


EVALUATED = {
    "CAUSAL_LM": ("loss", "perplexity", "token_accuracy", "exact_match"),
    "SEQ_CLS": ("loss", "accuracy", "macro_f1"),
}
"""Task (`lora_task_type`) -> the metrics that an evaluation measures."""

TRACKERS = ("tensorboard", "wandb", "trackio")
"""What a run can report to (`report_to`)."""

Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
]
"""The learning rate schedules of transformers that need no settings of their own."""


class Mark(Enum):
    """What holds of a key beyond its type, its default and its limits."""

    OF_CLIENT = "client_overrides may set it for a single client"
    FILE = "it may name a file, which shells complete"
    DIRECTORY = "it may name a directory, which shells complete"
    ABSOLUTE = "a run makes a path of it absolute, so that it can be resumed from any directory"
    AUTOMATIC = "where it is left open (none or auto), the run decides once and keeps it on resume"
    REWRITTEN = "the run may write it to config.yaml in another form than the user did"
    OUTPUT = "where and to whom the run reports; no number depends on it, a resume may change it"
    CARRIER = "what carries the messages to the clients; a resume may change it"
    REPETITION = "another value repeats the same experiment"
    OF_SITES = "with engine: sites the server sets it for all sites, which may bound it"
    MACHINE = "fits the run to its machine; another value is the same experiment"
    ALONE = "a client that trains by itself has another value than its federation"


@dataclass(frozen=True)
class Words:
    """Words that shells offer for a key, beyond those its type names."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class JsonSchema:
    """A key's JSON Schema, where the configuration checks more of it than its type says."""

    schema: Schema


def keys_marked(model: type[BaseModel], *marks: Mark) -> tuple[str, ...]:
    """The keys that carry at least one of these marks, in the order of their fields."""
    return tuple(
        key
        for key, field in model.model_fields.items()
        if any(mark in field.metadata for mark in marks)
    )


def annotation_of(model: type[BaseModel], key: str, kind: type[T]) -> T | None:
    """What a key carries of this kind (`Words`, `JsonSchema`), or None."""
    return next((x for x in model.model_fields[key].metadata if isinstance(x, kind)), None)


def alpha_of(lora_alpha: float | str, rank: int) -> float:
    """LoRA's alpha for a rank, from a number or a multiple of the rank such as `2r`.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(lora_alpha, float):
        return lora_alpha
    multiple = re.fullmatch(r"(\d*\.?\d+)?\s*\*?\s*r", lora_alpha)
    if not multiple:
        raise ValueError(
            f"lora_alpha: {lora_alpha!r} is neither a number nor a multiple of r (as 2r)"
        )
    return float(multiple.group(1) or 1) * rank


# --- JSON Schema of keys whose limits are checked in words of our own ---

NONE: Schema = {"enum": [None, "none"]}
"""What a key takes that may be none; the text is as good as YAML's null."""
_RANK: Schema = {"type": "integer", "minimum": 1}
_RANKS: Schema = {"type": "array", "items": _RANK, "minItems": 1}
_SHARE: Schema = {"type": "number", "minimum": 0}

RANK_OR_RANKS: Schema = {"anyOf": [_RANK, _RANKS, {"const": "auto"}, NONE]}
LIST_OF_RANKS: Schema = {"anyOf": [_RANKS, _RANK, NONE]}
LIST_OF_SHARES: Schema = {"anyOf": [{"type": "array", "items": _SHARE}, _SHARE, NONE]}
_MEMORY: Schema = {"type": "string", "pattern": r"^\s*\d+\.?\d*\s*[KMGTkmgt]i?[Bb]?\s*$"}
MEMORY_OR_MEMORIES: Schema = {
    "anyOf": [_MEMORY, {"type": "array", "items": _MEMORY, "minItems": 1}, NONE]
}
ALPHA: Schema = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^(\d*\.?\d+)?\s*\*?\s*r$", "examples": ["2r", "r"]},
    ]
}
NUMBER_OR_SHARE: Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        NONE,
    ]
}
SIZE_OR_AUTO: Schema = {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}
ADDRESSES: Schema = {
    "anyOf": [
        {"type": "object", "patternProperties": {".": {"type": "string", "pattern": r"\S"}}},
        {"type": "array", "items": {"type": "string", "pattern": "[^=]=."}, "minItems": 1},
        NONE,
    ]
}
TRAIN_FUNCTION: Schema = {
    "anyOf": [
        {"type": "string", "pattern": r"(^\w+(\.\w+)*|\.py):[A-Za-z_]\w*$"},
        NONE,
    ]
}
NUMBER_OF_STEPS: Schema = {"type": "integer", "minimum": -1, "not": {"const": 0}}


SizeOfMachine = Annotated[
    int | Literal["auto"], Mark.AUTOMATIC, Mark.MACHINE, JsonSchema(SIZE_OR_AUTO)
]
"""A number that `auto` fits to the machine."""


def names_among(*names: str) -> Schema:
    """One of these names, a list of them, or none."""
    return {
        "anyOf": [
            {"enum": [*names, None, "none"]},
            {"type": "array", "items": {"enum": [*names, "none"]}},
        ]
    }
