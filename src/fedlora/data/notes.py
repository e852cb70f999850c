"""Says what a user should know of the data: dropped rows, clients left out, columns not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedlora.data.rows import columns_of
from fedlora.data.templates import Template
from fedlora.data.tokenize import Outcome, Tokens
from fedlora.errors import InputError

if TYPE_CHECKING:
    from fedlora.data.raw_data import RawData


def reasons(outcomes: Iterable[Outcome]) -> Counter[str]:
    """Why rows were dropped -> how many."""
    return Counter(outcome for outcome in outcomes if isinstance(outcome, str))


def kept(outcomes: Iterable[Outcome]) -> list[Tokens]:
    """The tokens of the rows that were not dropped."""
    return [tokens for tokens in outcomes if not isinstance(tokens, str)]


def all_dropped(outcomes: Sequence[Outcome]) -> str:
    """A sentence on why all rows are dropped; empty where one is left, or there were none."""
    why = reasons(outcomes)
    if not why or why.total() < len(outcomes):
        return ""
    reason, number = why.most_common(1)[0]
    return (
        f"all {why.total()} rows are dropped"
        + (": " if len(why) == 1 else f", {number} of them because: ")
        + reason
        + ("; use a larger one" if "max_length" in reason else "")
    )


def left_out(raw: RawData, unusable: Mapping[int, str], strict: bool) -> list[str]:
    """A note on the clients none of whose rows can be used.

    Args:
        raw: all rows.
        unusable: such a client -> why its rows cannot be used.
        strict: no client may be left out (`strict_clients`).

    Raises:
        InputError: no other client has rows, or `strict` forbids leaving one out.
    """
    if not unusable:
        return []
    each = "; ".join(f"{raw.called(client)}: {why}" for client, why in unusable.items())
    if len(unusable) == sum(1 for rows in raw.clients if rows):
        raise InputError(each)
    if strict:
        raise InputError(f"{each}. Mend them, or leave strict_clients out to go on without them")
    many = f"{len(unusable)} of {len(raw.clients)} clients"
    return [f"{many} {'takes' if len(unusable) == 1 else 'take'} no part: {each}"]


def unused(raw: RawData, template: Template, *others: str | None) -> list[str]:
    """A note on columns that nothing reads; none where all are read.

    Args:
        raw: all rows.
        template: how they are read.
        others: columns that are read for something else.
    """
    used = {*template.reads, *others}
    names = [name for name in columns_of([*raw.train, *raw.eval]) if name not in used]
    return [f"columns not used: {', '.join(map(str, names))}"] if names else []


def one_answer_learnt(template: str, train_function: str | None) -> list[str]:
    """A note on preference data, where fedlora's own training learns half of what they say.

    Args:
        template: the name of the template by which rows were read.
        train_function: the training of the user's own that the configuration names.
    """
    if template != "preference" or train_function is not None:
        return []
    return [
        "preference data: the chosen answers are learnt; the rejected ones reach a train_function "
        "of your own alone, such as TRL's DPOTrainer (examples/trainers/dpo.py)"
    ]


def alike(label_names: Sequence[str]) -> list[str]:
    """A note on labels that differ by white space or capitals alone; none where there are none."""
    groups: dict[str, list[str]] = {}
    for name in label_names:
        groups.setdefault(" ".join(name.split()).casefold(), []).append(repr(name))
    same = [" and ".join(names) for names in groups.values() if len(names) > 1]
    if not same:
        return []
    return [
        "labels that differ by white space or capitals alone are counted as different: "
        + "; ".join(same)
    ]
