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
    """Why rows were dropped, and how many."""
    return Counter(outcome for outcome in outcomes if isinstance(outcome, str))


def kept(outcomes: Iterable[Outcome]) -> list[Tokens]:
    """The rows that were not dropped."""
    return [tokens for tokens in outcomes if not isinstance(tokens, str)]


def all_dropped(outcomes: Sequence[Outcome]) -> str:
    """Why no row is left, as a sentence; empty where some are, or there were none."""
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


def left_out(raw: RawData, useless: Mapping[int, str], strict: bool) -> list[str]:
    """What to say of clients without a row that can be used.

    Args:
        raw: all rows.
        useless: such a client -> why its rows cannot be used.
        strict: no client may be left out (`strict_clients`).

    Raises:
        InputError: they are all there are, or none is allowed.
    """
    if not useless:
        return []
    each = "; ".join(f"{raw.called(client)}: {why}" for client, why in useless.items())
    if len(useless) == sum(1 for rows in raw.clients if rows):
        raise InputError(each)
    if strict:
        raise InputError(f"{each}. Mend them, or leave strict_clients out to go on without them")
    many = f"{len(useless)} of {len(raw.clients)} clients"
    return [f"{many} {'takes' if len(useless) == 1 else 'take'} no part: {each}"]


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


def alike(label_names: Sequence[str]) -> list[str]:
    """A note on labels that are one and the same but for white space and capitals."""
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
