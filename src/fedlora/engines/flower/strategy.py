"""Combines adapters of different ranks in a Flower app: a strategy for ServerApps of one's own.

    strategy = FedLora("exact", clients_per_round=0.2)
    result = strategy.start(grid, ArrayRecord(get_peft_model_state_dict(model)), num_rounds=10)
    save(result.arrays, "final", model_name)

Each node trains a LoRA adapter of its own rank, in a ClientApp that uses `describe`, `load` and
`reply` (`fedlora.engines.flower.peft_client`), or reads and writes these records itself:

    QUERY       ->  nothing
                <-  ConfigRecord "adapter": rank, scale (alpha / r), num-examples, name
    TRAIN       ->  ArrayRecord "arrays": the adapter as PEFT keys, of the node's rank, at its scale
                    ArrayRecord "frozen": an adapter of scale 1 that is added and not trained
                    ConfigRecord "config": train_config, server-round, trained-factors,
                    sent-factors ("AB", "A", "B"), tail-penalty, tail-from
                <-  ArrayRecord "arrays", MetricRecord "metrics": num-examples and what is averaged
    EVALUATE    ->  as TRAIN; arrays and frozen together are the global model
                <-  MetricRecord "metrics"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from logging import INFO, WARNING
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedlora.config.rule_options import read_options
from fedlora.engines.flower.failures import in_words
from fedlora.engines.flower.nodes import Node, ask_nodes, wait_for_nodes
from fedlora.engines.flower.peft_records import (
    ARRAYS,
    CONFIG,
    FROZEN,
    METRICS,
    LoraState,
    global_record,
    lora_record,
    read_lora,
)
from fedlora.engines.flower.streaming import StreamingGrid
from fedlora.errors import InputError
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.exchange import Agreement, client_start, global_delta
from fedlora.federation.messages import Broadcast, ClientUpdate
from fedlora.federation.participants import Federation
from fedlora.federation.records import RoundRecord
from fedlora.federation.server import Server, initial_state
from fedlora.lowrank import Adapter, Deltas, LowRank, add_all, fold, zeros
from fedlora.methods import METHODS
from fedlora.runs.membership import with_all_ranks
from fedlora.text import nearest

_GROUP = "of the strategy"


class FedLora(Strategy):
    """A Flower strategy that combines LoRA adapters of different ranks by any of the package's rules.

    Args:
        method: the aggregation rule, a name in `fedlora.METHODS`.
        clients_per_round: how many nodes train in a round: a number, a share (0.3), or None: all.
        min_available_nodes: nodes that have to be there before the first round.
        client_weights: "examples": nodes weigh by the rows they trained on; "uniform": all alike.
        server_learning_rate: eta of the server's step on the global update.
        server_momentum: of the server's step (FedAvgM).
        evaluates: whether all nodes evaluate the global model after every round.
        node_timeout: seconds in which nodes have to connect, and to answer the query.
        seed: of the shared initialisation and of who is drawn.
        options: the rule's own options, such as `start_fraction`.

    Raises:
        InputError: an unknown rule or option, or an impossible value.
    """

    def __init__(
        self,
        method: str = "exact",
        *,
        clients_per_round: int | float | None = None,
        min_available_nodes: int = 2,
        client_weights: Literal["examples", "uniform"] = "examples",
        server_learning_rate: float = 1.0,
        server_momentum: float = 0.0,
        evaluates: bool = True,
        node_timeout: float = 600.0,
        seed: int = 42,
        **options: Any,
    ) -> None:
        if method not in METHODS:
            raise InputError(f"method: {method} is unknown" + nearest(method, list(METHODS)))
        try:
            self.options = read_options(method, options)
        except ValueError as error:
            raise InputError(str(error)) from None
        self.rule = METHODS[method]
        self.clients_per_round, self.client_weights = clients_per_round, client_weights
        self.min_available_nodes, self.node_timeout = min_available_nodes, node_timeout
        self.server_learning_rate = server_learning_rate
        self.server_momentum = server_momentum
        self.evaluates, self.seed = evaluates, seed
        self.nodes: list[Node] = []
        """The nodes that have told what they train; the index is a node's number (client)."""
        self.records: list[RoundRecord] = []
        """What every round has left: weights, bytes, aggregation error."""
        self._server: Server | None = None
        self._asked: dict[int, Broadcast] = {}
        self._timeout: float | None = None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Any = None,
    ) -> Result:
        """Run the federation; see `flwr.serverapp.strategy.Strategy.start`.

        Args:
            grid: as Flower hands it to the ServerApp.
            initial_arrays: the LoRA state dict of a fresh PEFT model: it tells the target modules,
                and the initial values of modules that are trained whole. One that was trained is
                gone on from. Its rank need be no node's, its scale is 1 (`lora_alpha = r`).
            num_rounds: of training.
            timeout: seconds after which a round waits for nobody; also the messages' ttl.
            train_config, evaluate_config: sent to the nodes as they are.
            evaluate_fn: `(round, arrays) -> MetricRecord`, called with the global model.

        Returns:
            Flower's result. Its `arrays` are the global model as one adapter of scale 1, whose
            modules may differ in rank; `save` writes them as a PEFT directory.

        Raises:
            InputError: nodes are missing, or what they train does not go together.
        """
        self._timeout = timeout
        streaming = StreamingGrid(grid)
        return super().start(
            streaming,
            initial_arrays,
            num_rounds,
            timeout,
            train_config,
            evaluate_config,
            evaluate_fn,
        )
