"""Names everything a run reports while it lives, and every line it leaves in `metrics.jsonl`.

An event is a mapping whose `event` says which of these it is. Whoever listens is a function of one
event (`Report`): the terminal, the lines of `--json`, `progress.json`, trackers, a caller's own.
Some events are also written as lines of `metrics.jsonl`, and some lines are only written:

    event           reported  logged  when
    begin           Begin     Header  model and data are loaded; see there why these are two
    warning         yes       no      at any time
    start           yes       yes     the model is evaluated as it is before round 1
    round_begin     yes       no      the server has sent its broadcasts
    client_begin    yes       no      a client's training begins
    step            yes       no      a client has made an optimiser step
    client_end      yes       no      a client has answered or failed
    evaluate_begin  yes       no      an evaluation of the global model begins
    round           yes       yes     a round is saved
    end             yes       yes     the last round is saved; `final/` is written next
    join            no        Join    a site takes part from the next round on (engine: sites)
    leave           no        Leave   a site takes part no longer (engine: sites)
    resume          no        Resume  a run that was interrupted goes on
    eval            no        Eval    `fedlora eval` has measured something later

Numbers that are not finite are null. Programs read these fields: names may be added, and none is
renamed. This module needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

Event = Mapping[str, Any]
"""Any of the events below, as those see it who listen."""

Report = Callable[[Event], None]
"""Is told about everything that happens, one event at a time."""

Scores = Mapping[str, Any]
"""What an evaluation measured: `loss`, `perplexity`, `accuracy` ... and, of a classifier,
`per_class`."""

DETAILS = frozenset({"round_begin", "client_begin", "step", "client_end", "evaluate_begin"})
"""Events of what goes on within a round; there are thousands, and `--json` leaves them out."""


def ignore(event: Event) -> None:
    """Listen to nothing."""


class Begin(TypedDict):
    """A run begins or goes on: what its listeners need to introduce it to a person.

    It is told at every start of a process. The `Header` in `metrics.jsonl` has the same name; it is
    written once, and tells a reader of files what was run, in full.

    Args:
        output_dir: the run's directory.
        resumed_from: the round it goes on after, 0 for the start; None in a new run.
        model: name or path of the base model.
        method: name of the aggregation rule.
        task: CAUSAL_LM or SEQ_CLS.
        num_rounds: how many rounds there will be.
        parameters: of the model, LoRA layers included.
        modules: number of target modules.
        ranks: of every client.
        rows: of every client, to train on.
        eval_rows: common rows to evaluate on.
        choices: what was decided for this machine, in words.
    """

    event: Literal["begin"]
    output_dir: str
    resumed_from: int | None
    model: str | None
    method: str
    task: str
    num_rounds: int
    parameters: int
    modules: int
    ranks: list[int]
    rows: list[int]
    eval_rows: int
    choices: list[str]


class Notice(TypedDict):
    """Something the user should know.

    Args:
        message: one line.
    """

    event: Literal["warning"]
    message: str


class RoundBegin(TypedDict):
    """A round begins.

    Args:
        round: counted from 1.
        clients: numbers of those that are asked, ascending.
        attempt: how often this round is tried now, counted from 1.
    """

    event: Literal["round_begin"]
    round: int
    clients: list[int]
    attempt: int


class ClientBegin(TypedDict):
    """A client begins to train; several do at once where they share a pass.

    Args:
        client: its number.
        rank: of the adapter it trains.
    """

    event: Literal["client_begin"]
    client: int
    rank: int


class Step(TypedDict):
    """A client has made a step.

    Args:
        client: its number.
        step: counted from 1 in every round.
        steps: how many it makes in this round.
        loss: of the step's rows.
        tokens: it was trained on in this step.
    """

    event: Literal["step"]
    client: int
    step: int
    steps: int
    loss: float
    tokens: int


class ClientEnd(TypedDict):
    """A client has sent its update, has failed or was told to stop.

    Args:
        client: its number.
        metrics: of its training; empty where no update came.
        rejected: why it does not count; "" where it does.
        outcome: `counted`, `failed`, `late` or `unneeded`, as in `ClientRecord`.
    """

    event: Literal["client_end"]
    client: int
    metrics: Mapping[str, Any]
    rejected: str
    outcome: str


class EvaluateBegin(TypedDict):
    """The global model is about to be evaluated."""

    event: Literal["evaluate_begin"]


class Evaluations(TypedDict, total=False):
    """What is measured of the global model; each part is there where there are rows for it.

    Args:
        evaluation: on the common rows. Under a rule with personal models and no global one, the
            mean over the clients' models.
        client_evaluations: client -> on its own held-out rows.
        general_evaluation: on general text, whose loss shows what is forgotten.
        evaluation_bytes_down: of the global model that sites were sent to evaluate it.
    """

    evaluation: Scores
    client_evaluations: Mapping[str, Scores]
    general_evaluation: Scores
    evaluation_bytes_down: int


class Start(Evaluations):
    """The model before round 1 was evaluated.

    Args:
        round: 0.
    """

    event: Literal["start"]
    round: int


class Seconds(TypedDict):
    """Where a round's time went, in seconds; together they are all of it, but for the saving.

    Args:
        train: clients train, or messages to and from them are on their way.
        aggregate: the server plans, takes updates and makes the next state.
        evaluate: the global model and the clients' own are evaluated.
    """

    train: float
    aggregate: float
    evaluate: float


class SometimesInRound(Evaluations, total=False):
    """Fields of a `Round` that are there only where they have something to say.

    Args:
        personal_evaluations: client -> of the model it ended with; with `eval_personal`.
        num_threads: torch's, where the run took another number than `num_threads` says.
        attempts: how often the round was tried; the record is of the last time. Lines of older
            versions have it not.
        compression_error_up: see `RoundRecord`; where messages are compressed.
        compression_error_down: the same of what was handed out.
        given_up_bytes_up: received in attempts that were given up; `bytes_up` has them not.
        given_up_bytes_down: sent in them.
    """

    personal_evaluations: Mapping[str, Scores]
    num_threads: int
    attempts: int
    compression_error_up: float
    compression_error_down: float
    given_up_bytes_up: int
    given_up_bytes_down: int


class Round(SometimesInRound):
    """A round has ended and is saved. The fields of `RoundRecord`, and more.

    Args:
        round: counted from 1.
        clients: the fields of `ClientRecord` of each client of the round, in their order.
        aggregation_error: see `RoundRecord`, as for the three that follow.
        truncation_error: of what was sent, where the rule truncates it.
        update_norm: Frobenius norm of the global model's change.
        global_rank: largest rank bound of a module of the global update.
        layers: target module -> the fields of `LayerRecord`.
        bytes_up: received from all clients.
        bytes_down: sent to all clients.
        seconds: where the time went.
    """

    event: Literal["round"]
    round: int
    clients: list[Mapping[str, Any]]
    aggregation_error: float | None
    truncation_error: float | None
    update_norm: float
    global_rank: int
    layers: Mapping[str, Mapping[str, Any]]
    bytes_up: int
    bytes_down: int
    seconds: Seconds


class End(TypedDict):
    """The last round is saved.

    Args:
        round: that one.
        final: the round whose model `final/` holds.
        best: the round with the best metric; None without an evaluation.
    """

    event: Literal["end"]
    round: int
    final: int
    best: int | None


class Join(TypedDict):
    """A site has joined a run that goes on already, and takes part from the next round on.

    Args:
        round: the last one that was committed then.
        client: the number it was given.
        name: the site's.
        rank: of the adapter it trains.
        rows: to train on.
        eval_rows: held out.
        tokens: in the rows to train on.
    """

    event: Literal["join"]
    round: int
    client: int
    name: str
    rank: int
    rows: int
    eval_rows: int
    tokens: int


class Leave(TypedDict):
    """A site has left a run for good.

    Args:
        round: the last one that was committed then.
        client: its number, which nobody else is given.
        name: the site's.
        reason: in its words.
    """

    event: Literal["leave"]
    round: int
    client: int
    name: str
    reason: str


class HeaderClient(TypedDict):
    """One client in the `Header`.

    Args:
        client: its number.
        name: of its site, of its file or of its value of the column that divides the rows; ""
            without one.
        rank: of the adapter it trains in round 1.
        rows: to train on.
        eval_rows: held out.
        tokens: in the rows to train on.
        counts: value of the header's `column` -> its rows as they were read, dropped and held-out
            ones among them.
    """

    client: int
    name: str
    rank: int
    rows: int
    eval_rows: int
    tokens: int
    counts: Mapping[str, int]


class SometimesInHeader(TypedDict, total=False):
    """A field of a `Header` that is there only under engine: sites.

    Args:
        run: the run's id, by which sites know it again.
    """

    run: str


class Header(SometimesInHeader):
    """What was run, on what and with what: the first line of `metrics.jsonl`, written once.

    Args:
        round: 0.
        started: ISO 8601, UTC.
        fedlora: the package's version.
        model: name or path of the base model.
        architecture: the model's class.
        parameters: of the model, LoRA layers included.
        method: name of the aggregation rule.
        task: CAUSAL_LM or SEQ_CLS.
        num_rounds: how many rounds there will be.
        modules: target module -> `[m, n]`, rows and columns of its weight.
        dense_parameters: trained whole, a classifier's head for example.
        clients: every client of the federation.
        column: whose values `counts` counts; None where no column is known.
        eval_rows: common rows to evaluate on.
        alone: the client that trains by itself; None in a federation.
        environment: versions of python, torch, transformers and peft; `device`; `threads`.
    """

    event: Literal["begin"]
    round: int
    started: str
    fedlora: str
    model: str | None
    architecture: str
    parameters: int
    method: str
    task: str
    num_rounds: int
    modules: Mapping[str, list[int]]
    dense_parameters: int
    clients: list[HeaderClient]
    column: str | None
    eval_rows: int
    alone: int | None
    environment: Mapping[str, Any]


class Resume(TypedDict):
    """A run goes on. Lines before this one about later rounds count no more.

    Args:
        round: the round it goes on after; 0 for the start.
    """

    event: Literal["resume"]
    round: int


class Eval(TypedDict):
    """`fedlora eval` measured something of a run.

    Args:
        round: whose model it was.
        name: of the measure: `held_out`, `general`, `mmlu` ...
        model: `base`, `global` or `client-K`.
        scores: what was measured.
    """

    event: Literal["eval"]
    round: int
    name: str
    model: str
    scores: Scores


REPORTED: Mapping[str, Any] = {
    "begin": Begin,
    "warning": Notice,
    "start": Start,
    "round_begin": RoundBegin,
    "client_begin": ClientBegin,
    "step": Step,
    "client_end": ClientEnd,
    "evaluate_begin": EvaluateBegin,
    "round": Round,
    "end": End,
}
"""What a run tells those who listen, by name."""

LOGGED: Mapping[str, Any] = {
    "begin": Header,
    "start": Start,
    "round": Round,
    "end": End,
    "join": Join,
    "leave": Leave,
    "resume": Resume,
    "eval": Eval,
}
"""The lines of `metrics.jsonl`, by name."""
