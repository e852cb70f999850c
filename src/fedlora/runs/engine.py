"""Describes what a run asks of an engine, which carries its messages to the clients and back.

The course of a run (`fedlora.runs.course`) does not know which engine it has: one that trains all
clients in this process, one that hands them to worker processes, or one that speaks to other
machines. To write one, implement `Engine` and give it to a `Course`; `fedlora.engines.local` is the
shortest example, and `tests/runs/test_course.py` has a smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fedlora.federation.messages import Broadcast, ClientState, ClientUpdate
from fedlora.lowrank import Deltas
from fedlora.methods.values import ServerState
from fedlora.runs.events import Evaluations

ELSEWHERE = "of the sites"
"""In the identity of an engine, in the place of what only its sites could tell."""


@dataclass(frozen=True)
class ClientResult:
    """A client has trained and sent its update.

    Args:
        update: what it sent.
        model: makes the model it ended the round with, all that is added to the base. It is called
            only where such models are kept or evaluated, and before the next result is asked for.
    """

    update: ClientUpdate
    model: Callable[[], Deltas]

    @property
    def client(self) -> int:
        """The client's number."""
        return self.update.client


@dataclass(frozen=True)
class Failure:
    """A client did not train, or its update did not come; the round goes on without it.

    Args:
        client: its number.
        reason: in words, for the log; it follows "client 3 is left out of round 2: ".
        late: whether all that is wrong is that it was not done by the deadline.
    """

    client: int
    reason: str
    late: bool = False


Exchange = Generator[ClientResult | Failure, None, None]
"""What becomes of a round's clients, one after the other; closing it calls off who is left."""


@dataclass(frozen=True)
class Joined:
    """Somebody takes part from the next round on.

    Args:
        client: the number it has from now on, the next one that nobody has had.
        name: for people.
        rank: of the adapter it trains.
        rows: to train on.
        eval_rows: held out.
        tokens: in the rows to train on.
    """

    client: int
    name: str
    rank: int
    rows: int
    eval_rows: int
    tokens: int


@dataclass(frozen=True)
class Left:
    """A client takes part no longer.

    Args:
        client: its number.
        name: for people.
        reason: in words.
    """

    client: int
    name: str
    reason: str


@dataclass(frozen=True)
class EngineState:
    """What an engine wants to find again when its run is resumed; it is saved with every round.

    Args:
        facts: as JSON, in `state.json`, beside what the course keeps there (`best`, `threads`).
        clients: client number -> what outlives a round at it, of those whose state this process
            holds.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    clients: Mapping[int, ClientState] = field(default_factory=dict)


class Engine(Protocol):
    """Carries broadcasts to clients and brings their updates, and evaluates models where rows are.

    All of it is called from one thread. An engine reports `client_begin` and `step` events by
    itself, where it hears of them; all other events are the course's.

    What a client makes of a broadcast depends on the broadcast, its own data and its own state
    alone, and the server folds in client order. Therefore the order of results changes no bit of a
    run, and an engine may repeat a client that it has no result from.
    """

    @property
    def identity(self) -> Mapping[str, str]:
        """What must be the same for a run to go on, beside its configuration.

        For example fingerprints of the base model and of the data. The names (an underscore for a
        blank) stand in the message when a resumed run finds another value.
        """

    @property
    def can_evaluate(self) -> bool:
        """Whether there is anything to evaluate the global model on."""

    def changes(self) -> Sequence[Joined | Left]:
        """Who has joined or left for good since this was asked last; it is asked before a round."""

    def exchange(self, broadcasts: Sequence[Broadcast], deadline: float | None = None) -> Exchange:
        """Carry a round's broadcasts to their clients, and bring what comes back.

        A client that fails is a value and not an exception: exactly one `ClientResult` or `Failure`
        comes for each client, in any order, as soon as it is known. A client of which nothing came
        when the iterator ends counts as failed, and what comes twice or of nobody is ignored. An
        exception ends the run: it says that the engine as a whole cannot go on.

        Args:
            broadcasts: one for each client of the round, in the order in which to begin with them:
                ascending by client, or drawn where the round asks more clients than it needs.
            deadline: a moment of `time.monotonic()` after which nobody is waited for, who is
                missing then being a `Failure` that is late; None: as long as it takes.

        Returns:
            A generator. Between two of its values the course folds the update and may evaluate, so
            an engine in one process must not count on the model being as it left it. The course
            closes it as soon as the round has the updates it needs (`clients_needed_per_round`).
            Then clients that still train are to stop, nobody else begins, an update that comes
            later is dropped, and what those clients keep for themselves is as it was before the
            round.
        """

    def evaluate(self, state: ServerState) -> Evaluations:
        """Evaluate the global model, or all clients' own ones under a rule that has no global one.

        Returns:
            What was measured, each part where there are rows for it.
        """

    def evaluate_client(
        self, client: int, model: Deltas, dense: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Evaluate a client's own model, on its own held-out rows or else on the common ones.

        Args:
            client: its number.
            model: all that is added to the base.
            dense: its parameters trained whole.

        Returns:
            `loss` and the other scores of the task.
        """

    def state(self) -> EngineState:
        """What is to be saved with the round that has just ended."""

    def restore(self, state: EngineState) -> None:
        """Go on from what was saved.

        Args:
            state: as `state` gave it; its `facts` may hold more names than the engine's own.
        """

    def close(self) -> None:
        """End what the engine began: processes, connections. Called once, however a run ended."""
