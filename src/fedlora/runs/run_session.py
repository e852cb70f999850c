"""Describes what the course of a run asks of its ingredients, wherever the clients' rows lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fedlora.config.config import Config
from fedlora.data.datasets import FederatedData
from fedlora.data.tokenize import Tokens
from fedlora.federation.participants import Federation
from fedlora.model.base import BaseModel
from fedlora.runs.events import HeaderClient


class RunSession(Protocol):
    """What the course of a run needs, which a `Session` and a `ServerSession` have."""

    @property
    def config(self) -> Config:
        """Resolved."""

    @property
    def base(self) -> BaseModel:
        """The base with adapter layers, of shapes alone where nobody computes with it."""

    @property
    def federation(self) -> Federation:
        """Who takes part."""

    @property
    def data(self) -> FederatedData:
        """The rows that lie in this process."""

    @property
    def general(self) -> Sequence[Tokens]:
        """Windows of general text."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """A classifier's labels in the order of their ids; empty: a causal model."""

    @property
    def first_values(self) -> Mapping[str, Tensor]:
        """The parameters trained whole, as they are before round 1."""

    @property
    def clients(self) -> list[HeaderClient]:
        """What the log says of every client."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know before it starts."""

    @property
    def choices(self) -> tuple[str, ...]:
        """What was decided for this machine, in words."""

    @property
    def asked(self) -> Mapping[str, Any]:
        """Of the keys in `SETTLED` that `config` holds otherwise, what the user wrote."""

    @property
    def column(self) -> str | None:
        """The column whose values the clients' counts count."""

    @property
    def lone(self) -> int | None:
        """The client that trains by itself; None: a federation."""

    @property
    def own_threads(self) -> bool:
        """Whether the run may lower the number of threads."""

    @property
    def run(self) -> str:
        """The run's id, where others know the run by it; "" where nobody does."""
