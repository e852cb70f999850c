"""Answers a server's messages at a site, one after the other, and tells what it is at.

It has no socket: `handle(message) -> answer`, both bytes, from any thread. A second message while
one is worked on is refused as busy, but for the very same one, which waits and gets the same bytes.
"""

from __future__ import annotations

import gc
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora import __version__
from fedlora.client.local_training import TrainFunction
from fedlora.client.trainer import train
from fedlora.config.config import Config
from fedlora.config.site import Site
from fedlora.config.site_run import run_config
from fedlora.engines.carrier import SiteError
from fedlora.engines.site_errors import StoppedError, log, told_to_server
from fedlora.engines.site_run import Loaded, SiteRun, load
from fedlora.engines.site_store import RunStore
from fedlora.federation.envelope import (
    Header,
    Message,
    RefusedMessageError,
    check_header,
    decode,
    encode,
)
from fedlora.federation.handshake import (
    AGREE,
    JOIN,
    LEAVE,
    leave_message,
    read_join,
    read_leave,
)
from fedlora.federation.held_model import HeldModel
from fedlora.federation.site_wire import EVALUATE
from fedlora.federation.wire import TRAIN

Answer = Callable[[], bytes]
"""Makes an answer."""

Load = Callable[[Site, Config, int, TrainFunction], Loaded]
"""Loads what a site needs as client K of a run of this configuration."""

_STATES = {JOIN: "loading", TRAIN: "training", EVALUATE: "evaluating"}


def _here(answer: Answer) -> bytes:
    return answer()


class SiteService:
    """What a worker does, without a socket.

    Args:
        site: its file.
        train_function: the local training.
        run_in: calls the function that makes an answer in the thread that torch is used in, and
            gives what it returns.
        load: gives what the site holds in memory: its base and its rows.
    """

    def __init__(
        self,
        site: Site,
        train_function: TrainFunction = train,
        run_in: Callable[[Answer], bytes] = _here,
        load: Load = load,
    ) -> None:
        self.site, self.train_function, self.run_in = site, train_function, run_in
        self.load = load
        self.bases_loaded = 0
        self._loaded: Loaded | None = None
        self._run: SiteRun | None = None
        self._turn = threading.Condition()
        self._asked: Header | None = None  # what is worked on
        self._until = float("inf")
        self._cancelled = False
        self._since = time.time()
        self._progress: dict[str, Any] = {}

    # --- calls ---

    def handle(self, message: bytes, seconds: float | None = None) -> bytes:
        """Answer a message.

        Args:
            message: of `fedlora.federation.envelope`, as bytes.
            seconds: until training is given up; None: as long as it takes.

        Raises:
            SiteError: what became of it instead.
        """
        until = float("inf") if seconds is None else time.monotonic() + seconds
        with told_to_server():
            read = decode(message)
            with self._alone(read.header, until):
                return self.run_in(lambda: self._answer(read, message))

    def cancel(self) -> None:
        """Give up what is worked on, after its next step."""
        with self._turn:
            self._cancelled = self._asked is not None

    def status(self) -> dict[str, Any]:
        """What the worker is at; counts and names of its own, none of its rows."""
        asked, run, loaded = self._asked, self._run, self._loaded
        return {
            "site": self.site.name,
            "version": __version__,
            "pid": os.getpid(),
            "state": _STATES.get(asked.kind, "answering") if asked else "idle",
            "since": self._since,
            "run": run.run if run else None,
            "round": asked.round if asked else run.last[0] if run else None,
            "attempt": asked.attempt if asked else run.last[1] if run else None,
            "step": None,
            "steps": None,
            "loss": None,
            **self._progress,
            "rows": loaded.session.report.num_examples if loaded else None,
            "eval_rows": len(loaded.eval_rows) if loaded else None,
            "rank": loaded.rank if loaded else None,
            "confirmed": run.held.round or 0 if run else None,
            "memory_bytes": _resident_bytes(),
            "bases_loaded": self.bases_loaded,
        }

    def restore(self) -> None:
        """Go on with the run that was taken part in before the worker ended, if there is one."""
        store = RunStore.last(Path(self.site.state_dir))
        join = store.kept("join") if store else None
        if store is None or join is None:
            return
        try:
            message = decode(join)
            with self._alone(message.header, float("inf")):
                run = self._join(message)
                if (agree := store.kept("agree")) is not None:
                    run.agree(decode(agree))
                    run.agreed = True
                run.last = max(store.answers(), default=run.last)
        except Exception as error:  # a server that asks to join is told what is wrong
            self._run = None
            log(f"cannot go on with run {store.run}: {error}")
            return
        log(f"goes on with run {store.run} after round {run.last[0]}")

    # --- one at a time ---

    @contextmanager
    def _alone(self, asked: Header, until: float) -> Iterator[None]:
        """Nothing else is worked on within.

        Raises:
            SiteError: something else is worked on.
        """
        with self._turn:
            while self._asked is not None:
                if self._asked != asked:
                    raise SiteError(
                        "busy",
                        f"this site is at {self._asked.kind} of round {self._asked.round}, attempt "
                        f"{self._asked.attempt}",
                    )
                left = until - time.monotonic()
                if left <= 0:
                    raise StoppedError("the deadline has passed")
                self._turn.wait(min(left, threading.TIMEOUT_MAX))
            self._asked, self._until, self._cancelled = asked, until, False
            self._since = time.time()
        try:
            yield
        finally:
            with self._turn:
                self._asked, self._progress, self._since = None, {}, time.time()
                self._turn.notify_all()

    def _check_time(self) -> None:
        """Give up where the deadline has passed, or the call was cancelled."""
        if self._cancelled:
            raise StoppedError("the call was cancelled")
        if time.monotonic() >= self._until:
            raise StoppedError("the deadline has passed")

    def _on_step(self, step: int, steps: int, loss: float, tokens: int) -> None:
        self._progress = {"step": step, "steps": steps, "loss": loss}
        if step < steps:
            self._check_time()

    # --- answers ---

    def _answer(self, message: Message, data: bytes) -> bytes:
        """The answer to a message that nothing else stands before."""
        kind = message.header.kind
        if kind == JOIN:
            return self._answer_join(message, data)
        run = self._run
        if run is None:
            raise RefusedMessageError("this site takes part in no run; it has to be asked to join")
        check_header(message.header, replace(message.header, run=run.run))
        if kind == LEAVE:
            return self._answer_leave(message)
        self._check_time()
        if kind == AGREE:
            answer = encode(run.agree(message))
            run.store.keep("agree", data)
            run.agreed = True
            return answer
        if kind not in (TRAIN, EVALUATE):
            raise RefusedMessageError(f"a site answers no message {kind[:40]}")
        if not run.agreed:
            raise RefusedMessageError("nothing was agreed yet; `agree` comes before any round")
        if kind == TRAIN:
            return run.train(message, self._on_step)
        return run.evaluate(message)

    def _answer_join(self, message: Message, data: bytes) -> bytes:
        run = self._join(message)
        store = run.store
        if (run.held.round or 0) > message.header.round:  # the server goes on from an earlier one
            run.held = HeldModel(run.held.agreement)
            store.keep_model(run.held)
        store.forget("agree")
        store.forget_answers()  # what is asked after this join may be another round of that number
        store.keep("join", data)
        log(f"joined run {run.run} as client {run.join.client}")
        return encode(run.joined(message.header))

    def _join(self, message: Message) -> SiteRun:
        """Load what a run needs, where it is not in memory already."""
        join, header = read_join(message), message.header
        config = run_config(self.site, join.method, join.config, join.client, join.num_clients)
        store = RunStore.of(Path(self.site.state_dir), header.run)
        loaded = self._loaded
        if loaded is None or (loaded.config, loaded.client) != (config, join.client):
            self._run = self._loaded = loaded = None
            gc.collect()  # the old base goes before the new one comes
            loaded = self._loaded = self.load(self.site, config, join.client, self.train_function)
            self.bases_loaded += 1
        loaded.worker.states.clear()
        before, agreement = self._run, loaded.session.agreement
        if before is not None and before.run == header.run and before.loaded is loaded:
            held = before.held
        else:
            held = store.model(agreement)
        floor = (header.round, 2**53)
        self._run = SiteRun(self.site.name, join, header.run, loaded, store, held, floor)
        return self._run

    def _answer_leave(self, message: Message) -> bytes:
        """Forget the run; what is loaded stays for one that asks for the same."""
        leave = read_leave(message)
        assert self._run is not None
        self._run.store.remove()
        self._run = None
        log(f"left run {message.header.run}: {leave.reason}")
        return encode(leave_message(message.header, leave))


def _resident_bytes() -> int:
    """Memory that this process takes; where the system does not tell, what it took at most."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()
