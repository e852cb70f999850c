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

from collections.abc import Iterable
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedlora.adapters.saved_adapter import as_factors
from fedlora.config.rule_options import read_options
from fedlora.engines.flower.failures import in_words
from fedlora.engines.flower.grid_calls import StreamingGrid, answering_node
from fedlora.engines.flower.node_messages import (
    content_for,
    read_update,
    round_config,
    weighted_means,
)
from fedlora.engines.flower.nodes import Node, ask_nodes, wait_for_nodes
from fedlora.engines.flower.peft_records import (
    METRICS,
    LoraState,
    global_record,
    read_lora,
)
from fedlora.errors import InputError
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.checks import check_rule
from fedlora.federation.exchange import Agreement, client_start, global_delta
from fedlora.federation.messages import Broadcast
from fedlora.federation.participants import Federation
from fedlora.federation.records import RoundRecord
from fedlora.federation.server import Server, initial_state
from fedlora.lowrank import add_all, prefix, zeros
from fedlora.methods import METHODS
from fedlora.runs.membership import with_all_ranks
from fedlora.text import nearest


class FedLora(Strategy):  # type: ignore[misc]
    """A Flower strategy that combines LoRA adapters of different ranks by any rule.

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
        self._grid: Grid | None = None

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

    # --- training ---

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every node of the round what its rank needs; nodes that are new are asked first."""
        self._grid = grid
        self._meet_nodes(arrays, grid)
        server = self._started
        self._asked = server.plan()
        messages = []
        for client, broadcast in self._asked.items():
            start = client_start(broadcast, server.agreement)
            frozen = add_all([broadcast.base_delta, start.frozen])
            asked = round_config(self.rule.training(self.options), broadcast.round)
            told = {**config, **asked, "server-round": server_round}
            scale = self.nodes[client].scale
            content = content_for(scale, start.adapter, frozen, broadcast.dense, told)
            messages.append(self._message(client, content, MessageType.TRAIN, server_round))
        log(INFO, "configure_train: %d of %d nodes", len(messages), len(self.nodes))
        return messages

    def _meet_nodes(self, arrays: ArrayRecord, grid: Grid) -> None:
        """Take in the nodes that are there, and leave out for now those that are not.

        Raises:
            InputError: too few are there, or have told what they train.
        """
        wanted = 1 if self._server else self.min_available_nodes
        present = set(wait_for_nodes(grid, wanted, self.node_timeout))
        new, problems = ask_nodes(
            grid, present - {node.id for node in self.nodes}, self.node_timeout
        )
        for node, problem in problems.items():
            log(WARNING, "node %d is left out: %s", node, problem)
        self.nodes.extend(new)
        if self._server is None:
            if len(self.nodes) < self.min_available_nodes:
                raise InputError(
                    f"{len(self.nodes)} of {self.min_available_nodes} nodes have told what they "
                    f"train; {'; '.join(sorted(set(problems.values())))}"
                )
            self._server = self._server_of(read_lora(arrays))
        federation = replace(
            self._server.federation,
            ranks=[node.rank for node in self.nodes],
            num_examples=[n.num_examples if n.id in present else 0 for n in self.nodes],
        )
        check_rule(self.rule, federation.ranks)
        self._server.federation = federation
        self._server.state = with_all_ranks(self._server.state, federation)

    def _server_of(self, initial: LoraState) -> Server:
        """The server of the federation, by what the initial arrays tell.

        Raises:
            InputError: they are no LoRA state dict, or the rule cannot combine the nodes' ranks.
        """
        given = initial.updates(1.0)
        if not given or initial.a.keys() != initial.b.keys():
            raise InputError(
                "initial_arrays: expected the state dict of a LoRA adapter, as "
                "ArrayRecord(get_peft_model_state_dict(model)) gives it"
            )
        trained_before = {name: x for name, x in given.items() if x.B.any()}
        shapes = {name: x.shape for name, x in given.items()}
        federation = Federation(
            ranks=[node.rank for node in self.nodes],
            num_examples=[node.num_examples for node in self.nodes],
            agreement=Agreement(self.rule, self.options, shapes, self.seed),
            clients_per_round=self.clients_per_round,
            client_weights=self.client_weights,
            server_learning_rate=self.server_learning_rate,
            server_momentum=self.server_momentum,
        )
        state = initial_state(federation, trained_before, initial.whole)
        return Server(federation, state, Mean())

    @property
    def _started(self) -> Server:
        if self._server is None:
            raise RuntimeError("configure_train makes the first round; call it, or start")
        return self._server

    def _message(self, client: int, content: RecordDict, kind: str, number: int) -> Message:
        node = self.nodes[client].id
        return Message(content, node, kind, ttl=self._timeout, group_id=str(number))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the nodes' adapters by the rule, each as it comes.

        A node that fails, or whose reply cannot be used, is left out of the round, with a warning.

        Returns:
            The global model as one adapter of scale 1, and the nodes' metrics, weighted, with
            `aggregation-error` where it is known. (None, None) where no node counts: the global
            model stays as it is.
        """
        server, missing = self._started, dict.fromkeys(self._asked, "it did not answer in time")
        metrics = dict[int, MetricRecord]()
        for reply in replies:
            client = self._client_of(reply)
            if client not in missing:
                continue
            try:
                update, metrics[client] = read_update(
                    reply, self._asked[client], self.nodes[client].scale, server.agreement
                )
                refused = server.accept(update)
            except ValueError as error:
                missing[client] = str(error)
                continue
            del missing[client]
            if refused:
                log(WARNING, "node %d does not count: %s", self.nodes[client].id, refused)
        for client, reason in missing.items():
            server.reject(client, reason)
            log(WARNING, "node %d is left out: %s", self.nodes[client].id, reason)
        record = server.commit()
        self.records.append(record)
        weights = {c.client: c.weight for c in record.clients if c.weight}
        if not weights:
            return None, None
        means = weighted_means({client: metrics[client] for client in weights}, weights)
        if record.aggregation_error is not None:
            means["aggregation-error"] = record.aggregation_error
        state = server.state
        return global_record(global_delta(state), state.dense), means

    def _client_of(self, reply: Message) -> int:
        """The number of the node that answers; -1: of none.

        Flower answers in the place of a node that is gone. Then only the message that is answered
        says whose the reply is.
        """
        numbers = {node.id: client for client, node in enumerate(self.nodes)}
        return numbers.get(answering_node(self._grid, reply), -1)

    # --- evaluation ---

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the global model to every node that is there."""
        if not self.evaluates:
            return []
        server = self._started
        state, own = server.state, bool(self.rule.training(self.options).keeps)
        told = {**config, "server-round": server_round}
        present, messages = set(grid.get_node_ids()), []
        for client, node in enumerate(self.nodes):
            if node.id not in present:
                continue
            if own:  # the node puts factors of its own into the adapter
                trained = {n: prefix(as_factors(x), node.rank) for n, x in state.adapter.items()}
                frozen = state.base_delta
            else:
                trained = {n: zeros(s, node.rank) for n, s in server.agreement.shapes.items()}
                frozen = global_delta(state)
            content = content_for(node.scale, trained, frozen, state.dense, told)
            messages.append(self._message(client, content, MessageType.EVALUATE, server_round))
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The nodes' metrics, weighted by the rows that each evaluated on; None without any."""
        metrics, weights = dict[int, MetricRecord](), dict[int, float]()
        for reply in replies:
            client = self._client_of(reply)
            if client < 0:
                continue
            if reply.has_error():
                log(WARNING, "node %d: %s", self.nodes[client].id, in_words(reply.error))
                continue
            told = reply.content.metric_records.get(METRICS, MetricRecord())
            rows = told.get("num-examples", 0)
            if isinstance(rows, int) and rows > 0:
                metrics[client], weights[client] = told, float(rows)
        return weighted_means(metrics, weights) if weights else None

    def summary(self) -> None:
        """Log what the strategy does."""
        log(INFO, "\t├──> Rule: %s (%s)", self.rule.name, self.rule.title)
        log(INFO, "\t├──> Options: %s", self.options)
        log(INFO, "\t├──> Nodes of a round: %s", self.clients_per_round or "all")
        log(INFO, "\t└──> Weights: %s", self.client_weights)
