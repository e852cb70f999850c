"""Says how much memory each client's training takes, from its longest rows, and fits its rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedlora.client.planned_memory import ClientMemory, client_memory
from fedlora.config.config import Config
from fedlora.data.datasets import FederatedData
from fedlora.data.tokenize import Tokens
from fedlora.methods import METHODS
from fedlora.model.acceleration import accelerate
from fedlora.model.base import BaseModel
from fedlora.model.loading import load_model
from fedlora.model.sources import Source
from fedlora.runs.planning.fitting import with_fitting_ranks
from fedlora.runs.planning.simulated_traffic import adds_to_base


class ClientNeeds:
    """Tells what clients' training takes; what was found out once is kept.

    Args:
        base: on the meta device.
        data: of all clients.
        config: of the run.
    """

    def __init__(self, base: BaseModel, data: FederatedData, config: Config) -> None:
        self._base, self._config = base, config
        self._rows = [row for part in data.clients for row in part.train]
        self._on_gpu = torch.cuda.is_available() and not config.use_cpu
        self._merges = adds_to_base(METHODS[config.method], config.rule_options())
        self._known = dict[tuple[int, int, bool], ClientMemory]()

    def memory(self, client: int, batch: int, rank: int) -> ClientMemory:
        """What training takes with micro-batches of so many samples and an adapter of this rank.

        The largest micro-batch is the one of the longest rows that any client has: whoever has
        shorter ones needs less.
        """
        dropout = self._config.of_client(client).lora_dropout
        key = batch, rank, dropout > 0
        if key not in self._known:
            self._known[key] = client_memory(
                self._base,
                longest_rows(self._rows, batch),
                rank,
                on_gpu=self._on_gpu,
                merges=self._merges,
                dropout=dropout,
            )
        return self._known[key]

    def total(self, client: int, batch: int, rank: int) -> int:
        """Bytes of all of it."""
        return self.memory(client, batch, rank).total


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
        InputError: a client's memory does not hold the model and one sample.
    """
    if config.client_ranks != "auto":
        return config, []
    base, _ = load_model(source, tokenizer, config, data.label_names, weights=False)
    accelerate(base.model, gradient_checkpointing=config.gradient_checkpointing)
    needs = ClientNeeds(base, data, config)
    return with_fitting_ranks(config, len(data.clients), needs.total)


def longest_rows(rows: Sequence[Tokens], number: int) -> list[Tokens]:
    """So many of the longest rows."""
    return sorted(rows, key=lambda row: len(row["input_ids"]))[-number:]


def usual_rows(rows: Sequence[Tokens], number: int) -> list[Tokens]:
    """So many rows of usual length."""
    ordered = longest_rows(rows, len(rows))
    begin = max(0, (len(ordered) - number) // 2)
    return ordered[begin : begin + number]
