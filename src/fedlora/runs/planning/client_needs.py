"""Says how much memory each client's training takes, from its longest rows, and fits its rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedlora.client.planned_memory import ClientMemory, client_memory
from fedlora.config.config import Config
from fedlora.data.datasets import FederatedData
from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.methods import METHODS
from fedlora.model.acceleration import accelerate
from fedlora.model.base import BaseModel
from fedlora.model.loading import load_model
from fedlora.model.quantisation import bits_of
from fedlora.model.quantised_linear import Bits
from fedlora.model.sources import Source
from fedlora.runs.planning.fitting import with_fitting_ranks
from fedlora.runs.planning.simulated_traffic import adds_to_base
from fedlora.runs.precisions import load_other_bases


class ClientNeeds:
    """Tells what clients' training takes; what was found out once is kept.

    Args:
        base: on the meta device.
        data: of all clients.
        config: of the run.
        other_bases: client -> its base, of those that hold it in another precision.
    """

    def __init__(
        self,
        base: BaseModel,
        data: FederatedData,
        config: Config,
        other_bases: Mapping[int, BaseModel] | None = None,
    ) -> None:
        self._base, self._config, self._other_bases = base, config, other_bases or {}
        self._rows = [row for part in data.clients for row in part.train]
        self._on_gpu = torch.cuda.is_available() and not config.use_cpu
        self._merges = adds_to_base(METHODS[config.method], config.rule_options())
        self._known = dict[tuple[int, int, bool, Bits | None], ClientMemory]()

    def memory(self, client: int, batch: int, rank: int) -> ClientMemory:
        """What training takes with micro-batches of so many samples and an adapter of this rank.

        The largest micro-batch is the one of the longest rows that any client has: whoever has
        shorter ones needs less.

        Raises:
            InputError: the architecture's pass cannot be run on shapes alone.
        """
        own = self._config.of_client(client)
        key = batch, rank, own.lora_dropout > 0, bits_of(own)
        if key not in self._known:
            try:
                self._known[key] = client_memory(
                    self._other_bases.get(client, self._base),
                    longest_rows(self._rows, batch),
                    rank,
                    on_gpu=self._on_gpu,
                    merges=self._merges,
                    dropout=own.lora_dropout,
                )
            except Exception as error:  # whatever the code of a model raises on shapes alone
                reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
                raise InputError(
                    f"the memory of this architecture cannot be planned ({reason})"
                ) from error
        return self._known[key]

    def total(self, client: int, batch: int, rank: int) -> int:
        """Bytes of all of it, for `client_ranks: auto`.

        Raises:
            InputError: as `memory`, and what to give instead.
        """
        try:
            return self.memory(client, batch, rank).total
        except InputError as error:
            raise InputError(f"{error}; give client_ranks as a list") from error


def with_ranks_that_fit(
    config: Config, source: Source, tokenizer: Any, data: FederatedData
) -> tuple[Config, list[str]]:
    """The configuration with `client_ranks: auto` decided, and what was chosen, in words.

    Args:
        config: with its dtype decided.
        source: of the model, none of whose weights are read.
        tokenizer: of the data.
        data: tokenised, of all clients.

    Raises:
        InputError: a client's memory does not hold the model and one sample, or what they take
            cannot be told.
    """
    if config.client_ranks != "auto":
        return config, []

    def load(own: Config) -> BaseModel:
        base, _ = load_model(source, tokenizer, own, data.label_names, weights=False)
        accelerate(base.model, gradient_checkpointing=own.gradient_checkpointing)
        return base

    other_bases, _ = load_other_bases(config, load)
    needs = ClientNeeds(load(config), data, config, other_bases)
    return with_fitting_ranks(config, len(data.clients), needs.total)


def longest_rows(rows: Sequence[Tokens], number: int) -> list[Tokens]:
    """So many of the longest rows."""
    return sorted(rows, key=lambda row: len(row["input_ids"]))[-number:]


def usual_rows(rows: Sequence[Tokens], number: int) -> list[Tokens]:
    """So many rows of usual length."""
    ordered = longest_rows(rows, len(rows))
    begin = max(0, (len(ordered) - number) // 2)
    return ordered[begin : begin + number]
