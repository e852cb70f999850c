"""Holds what a site tells the server before the first round, and compares what all of them tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.methods.rule import Shapes


@dataclass(frozen=True)
class SiteReport:
    """What the server has to know of a site; plain values, which can be sent as JSON.

    The rule and the seed are not in it: server and site both have them from the configuration, and
    compare them as what they agree on.

    Args:
        client: the client's number, counted from 0.
        name: what its rows are called, for people; a file's name, for example.
        num_examples: rows it trains on.
        rank: of the adapter it trains.
        label_names: a classifier's labels in the order of their ids; empty: a causal model.
        base: fingerprint of the base's frozen weights.
        data: fingerprint of its tokens.
        tokens: in the rows it trains on.
        eval_rows: rows it evaluates the global model on.
        shapes: target module -> `(m, n)`, for the server to compare; empty: not told.
        full_params: shapes of the parameters trained whole, where it has told `shapes`.
    """

    client: int
    name: str
    num_examples: int
    rank: int
    label_names: tuple[str, ...]
    base: str
    data: str
    tokens: int = 0
    eval_rows: int = 0
    shapes: Shapes = field(default_factory=dict)
    full_params: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def in_client_order(config: Config, reports: Sequence[SiteReport]) -> list[SiteReport]:
    """The reports by client number, after a look whether the sites can train together.

    Raises:
        InputError: a client is missing or there twice, or sites differ in their labels or in the
            weights of their base.
    """
    ordered = sorted(reports, key=lambda report: report.client)
    number = config.num_clients or len(ordered)
    clients = [report.client for report in ordered]
    if not ordered or clients != list(range(number)):
        raise InputError(
            f"the sites report the clients {', '.join(map(str, clients)) or 'none'}; each of "
            f"{number} clients, counted from 0, has to report once"
        )
    first = ordered[0]
    for other in ordered[1:]:
        if other.label_names != first.label_names:
            raise InputError(
                f"label_names: {_called(other)} has {_listed(other.label_names)}, {_called(first)} "
                f"{_listed(first.label_names)}; give all sites the same, in "
                "the same order"
            )
        if other.base != first.base:
            raise InputError(
                f"model_name_or_path: {_called(other)} holds other weights than {_called(first)}, "
                f"or holds them in another dtype; give all sites the same base and "
                "the same dtype"
            )
    return ordered


def _called(report: SiteReport) -> str:
    return f"client {report.client}" + (f" ({report.name})" if report.name else "")


def _listed(label_names: Sequence[str]) -> str:
    return ", ".join(label_names) or "none"
