"""Takes part in one run at a site: compares the agreement, trains, and evaluates.

It has no socket. Bytes, locks and the order of calls are the service's (`engines.site_service`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedlora.client.evaluate import evaluate
from fedlora.client.local_training import StepCallback, TrainFunction
from fedlora.client.trainer import training_of
from fedlora.client.worker import Worker, local_training_of
from fedlora.config.config import Config
from fedlora.config.site import Site
from fedlora.config.site_run import check_steps
from fedlora.data.site_rows import load_site_rows
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.engines.carrier import SiteError
from fedlora.engines.site_errors import log
from fedlora.engines.site_store import RunStore, Turn, disguised
from fedlora.federation.envelope import Header, Message, RefusedMessageError, check_header, encode
from fedlora.federation.handshake import (
    Agreed,
    Evaluated,
    Join,
    Joined,
    agreed_message,
    counted_of,
    evaluated_message,
    joined_message,
    read_agree,
)
from fedlora.federation.held_model import GlobalModel, HeldModel
from fedlora.federation.messages import Broadcast, ClientState
from fedlora.federation.wire import trained_message
from fedlora.lowrank import Deltas, LowRank
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.site_session import SiteSession, assemble_site

NEVER: Turn = (0, 0)
"""The turn of no training."""


@dataclass(frozen=True)
class Loaded:
    """What a site holds in memory: the base, its rows, and what trains.

    Args:
        config: the configuration that it was loaded for.
        client: the site's number.
        session: the base and the rows.
        worker: trains; its states are those of the run that is taken part in.
        eval_rows: what the global model is evaluated on here.
        first_values: the parameters that are trained whole, as they are before any round.
    """

    config: Config
    client: int
    session: SiteSession
    worker: Worker
    eval_rows: Sequence[Tokens]
    first_values: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """Of the adapter that is trained here."""
        return self.session.report.rank


def load(site: Site, config: Config, client: int, train_function: TrainFunction) -> Loaded:
    """Load the base and the site's rows.

    Raises:
        BoundError: the rows are more steps than the site allows; no weight was read.
        InputError: what cannot be used, and what to do.
    """
    _check_epochs(site, config, client)
    train_function = training_of(config.train_function, train_function)
    session = assemble_site(config, client)
    for line in (*session.choices, *session.warnings):
        log(line)
    held_out = session.data.eval
    own_file = config.eval_file or (config.dataset_test_split and not config.train_file)
    worker = Worker(
        session.base, {client: session.data}, session.config, session.agreement, train_function
    )
    return Loaded(
        config,
        client,
        session,
        worker,
        # Without a file of its own the session's rows are those held out.
        eval_rows=[*held_out, *session.eval] if own_file else session.eval,
        first_values=session.base.read_full_params(),
    )


def _check_epochs(site: Site, config: Config, client: int) -> None:
    """Hold the steps of the epochs against the bound, where there is one: rows are counted first.

    Rows that are held out, or turn out to be of no use, are counted too.
    """
    if site.bounds.max_steps is None or config.max_steps > 0:
        return
    raw = load_site_rows(resolve_paths(config), client, client + 1)
    rows = min(len(raw.clients[client]), config.max_train_samples or 2**62)
    check_steps(site, local_training_of(config).steps(rows))


@dataclass
class SiteRun:
    """A run that the site takes part in.

    Args:
        site: its name.
        join: what the server asked.
        run: the run's id.
        loaded: base and rows.
        store: what is kept on disk.
        held: the global model that the site holds.
        floor: trainings up to this one are of the past.
        agreed: both sides hold to the same.
        last: the last training that was answered.
    """

    site: str
    join: Join
    run: str
    loaded: Loaded
    store: RunStore
    held: HeldModel
    floor: Turn = NEVER
    agreed: bool = False
    last: Turn = field(default=NEVER)

    # --- taking part ---

    def joined(self, asked: Header) -> Message:
        """What the site tells of itself."""
        session = self.loaded.session
        report, base, rows = session.report, session.base, session.data.train
        return joined_message(
            asked,
            Joined(
                site=self.site,
                client=report.client,
                num_examples=report.num_examples,
                tokens=sum(len(row["input_ids"]) for row in rows),
                eval_rows=len(self.loaded.eval_rows),
                rank=report.rank,
                label_names=report.label_names,
                base=report.base,
                data=disguised(self.store.path.parent, report.data),
                architecture=type(base.model).__name__,
                parameters=base.num_parameters,
                shapes=base.targets.shapes,
                full_params={name: tuple(x.shape) for name, x in self.loaded.first_values.items()},
                confirmed=self.held.round or 0,
            ),
        )

    def agree(self, message: Message) -> Message:
        """Compare what both sides hold to.

        Raises:
            RefusedMessageError: it differs.
        """
        agree, report = read_agree(message), self.loaded.session.report
        self.check(message.header)
        if agree.digest != self.digest:
            raise RefusedMessageError("the agreement's digest is not the one of its header")
        if agree.client != report.client:
            raise RefusedMessageError(
                f"it calls this site client {agree.client}; it joined as client {report.client}"
            )
        if agree.rank != report.rank:
            raise RefusedMessageError(
                f"it asks for rank {agree.rank}, and this site trains rank {report.rank}"
            )
        values = self.loaded.first_values if agree.first_values else {}
        return agreed_message(message.header, Agreed(self.digest, values))

    @property
    def digest(self) -> str:
        """Of the agreement, as this site makes it."""
        return self.loaded.session.agreement.digest

    def check(self, asked: Header) -> None:
        """Refuse what was made for another base or agreement.

        Raises:
            RefusedMessageError: what differs.
        """
        own = replace(asked, base=self.loaded.session.report.base, agreement=self.digest)
        check_header(asked, own)

    # --- rounds ---

    def train(self, message: Message, on_step: StepCallback) -> bytes:
        """Train a round, and keep on disk what was answered.

        Raises:
            RefusedMessageError: it is of the past, or not for this site.
        """
        turn = message.header.round, message.header.attempt
        self.check(message.header)
        if turn == self.last and (path := self.store.answers().get(turn)):
            return path.read_bytes()
        past = max(self.floor, self.last)
        if turn < past or turn[0] <= self.floor[0]:
            raise RefusedMessageError(
                f"attempt {turn[1]} of round {turn[0]} is of the past: this site is at attempt "
                f"{past[1]} of round {past[0]}"
            )
        broadcast = self.held.applied(message)
        self._check_broadcast(broadcast)
        if broadcast.rank != self.loaded.rank:
            raise RefusedMessageError(
                f"it asks for rank {broadcast.rank}, and this site trains rank {self.loaded.rank}"
            )
        worker, client = self.loaded.worker, self.loaded.client
        self.store.keep_only(self._take_up(message))
        update = worker.handle(broadcast, lambda: on_step)
        confirmation = self.held.confirmation()
        compression = self.loaded.session.agreement.compression
        answer = encode(trained_message(message.header, [update], {}, confirmation, compression))
        if client in worker.states:
            self.store.keep_state(turn, worker.states[client])
        self.store.keep_answer(turn, answer)
        self.store.keep_model(self.held)
        self.last = turn
        return answer

    def evaluate(self, message: Message) -> bytes:
        """Measure the global model on the site's held-out rows.

        Raises:
            RefusedMessageError: it is not for this site.
        """
        self.check(message.header)
        model = self.held.evaluated(message)
        self._check_model(model)
        self._take_up(message)
        session, rows = self.loaded.session, self.loaded.eval_rows
        evaluated = Evaluated(0, 0, {})
        if rows:
            adapter = _with_kept(model.adapter, self.loaded.worker.states)
            session.base.load([model.base_delta, adapter], full_params=model.dense)
            config, label_names = session.config, session.report.label_names
            metrics = evaluate(
                session.base.model,
                session.base.tokenizer,
                rows,
                batch_size=config.per_device_eval_batch_size,
                exact_match=config.eval_exact_match is True,
                max_new_tokens=config.generation_max_new_tokens,
                label_names=label_names,
            )
            evaluated = Evaluated(len(rows), _labels(rows, label_names), metrics)
        self.store.keep_model(self.held)
        return encode(evaluated_message(message.header, evaluated))

    def _check_broadcast(self, broadcast: Broadcast) -> None:
        """Refuse what is for another client, or for other modules than this site has."""
        loaded = self.loaded
        if broadcast.client != loaded.client:
            raise RefusedMessageError(
                f"it is for client {broadcast.client}, and this site is client {loaded.client}"
            )
        shapes = loaded.session.base.targets.shapes
        if unknown := set(broadcast.modules or ()) - set(shapes):
            raise RefusedMessageError(f"module {min(unknown)[:80]} is not one of this site's base")
        self._check_model(GlobalModel(broadcast.adapter, broadcast.base_delta, broadcast.dense))

    def _check_model(self, model: GlobalModel) -> None:
        """Refuse a model of other modules than this site has, or of other parameters."""
        loaded = self.loaded
        shapes = loaded.session.base.targets.shapes
        for group in (model.adapter, model.base_delta):
            for name, delta in group.items():
                if tuple(delta.shape) != shapes.get(name):
                    raise RefusedMessageError(f"module {name[:80]} is not one of this site's base")
        came = {name: x.shape for name, x in model.dense.items()}
        if came != {name: x.shape for name, x in loaded.first_values.items()}:
            raise RefusedMessageError("other parameters are trained whole than at this site")

    def _take_up(self, message: Message) -> Turn:
        """Go on from what the client kept after the training that counted last; gives that."""
        counted = counted_of(message)
        worker, client = self.loaded.worker, self.loaded.client
        worker.states.clear()
        state = None if counted == NEVER else self.store.state(counted)
        if state is not None:
            worker.states[client] = state
        elif counted != NEVER and self.loaded.session.agreement.training.keeps:
            raise SiteError(
                "refused",
                f"this site has lost what it kept after round {counted[0]}, and cannot go on from "
                "there; begin the run anew, or let the site leave",
            )
        return counted


def _with_kept(adapter: Deltas, states: Mapping[int, ClientState]) -> Deltas:
    """The global adapter with the factor that the client keeps for itself in its place."""
    (factors,) = [state.factors for state in states.values()] or [{}]
    return {
        name: LowRank(x.A, factors.get(f"{name}.B", x.B)) if isinstance(x, LowRank) else x
        for name, x in adapter.items()
    }


def _labels(rows: Sequence[Tokens], label_names: Sequence[str]) -> int:
    """What a mean over these rows is a mean over: rows of a classifier, or labelled tokens."""
    if label_names:
        return len(rows)
    return sum(label != IGNORE for row in rows for label in row["labels"][1:])
