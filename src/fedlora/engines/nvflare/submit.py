"""Submits a run to the server of a federation, follows it, fetches it, and submits it again.

A job that was lost (the server's machine was restarted, a site's job process was killed) is
followed by another one, which goes on after the last round that the server has saved.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from fedlora.adapters.saved_adapter import load_adapter
from fedlora.config.config import Config
from fedlora.engines.nvflare.feed import Outcome, read_outcome
from fedlora.engines.nvflare.hosting import RESULT
from fedlora.engines.nvflare.kit import AdminKit, read_admin_kit
from fedlora.engines.nvflare.mirror import Mirror
from fedlora.engines.nvflare.order import Order, run_id, write_job
from fedlora.engines.nvflare.presence import present_sites
from fedlora.engines.nvflare.session import (
    AdminSession,
    Connect,
    NotRunningError,
    SilentError,
    UnreachableError,
    connect,
    has_ended,
)
from fedlora.engines.roster import Roster, roster_of
from fedlora.errors import FedloraError, InputError
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.directory import RunDirectory
from fedlora.runs.events import Notice, Report
from fedlora.runs.file_names import FINAL, METRICS
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.results import Callbacks, Result

MOST_LOST = 3
"""Jobs that may be lost, one after the other, without a round between them."""


@dataclass(frozen=True)
class Patience:
    """How long things are waited for, in seconds.

    Args:
        poll: between two questions to the server.
        start: for a job to begin, to end, and to answer while its process is there.
        silence: for a job that is said to run and has no process, before it counts as lost.
        server: for a server to come back.
        abort: for a job to end that was aborted.
        sites: for sites to come back, before a lost job is submitted again.
    """

    poll: float = 0.5
    start: float = 300.0
    silence: float = 20.0
    server: float = 600.0
    abort: float = 30.0
    sites: float = 120.0


def run_on_nvflare(
    config: Config,
    callbacks: Callbacks,
    report: Report,
    connect: Connect = connect,
    patience: Patience = Patience(),
) -> Result:
    """Run a new federation; see `fedlora.engines.local.run`.

    Args:
        config, callbacks, report: see there; callbacks are not possible.
        connect: logs in to the server.
        patience: how long things are waited for.
    """
    _refuse_callbacks(callbacks)
    kit = read_admin_kit(config.kit or "")
    with closing(connect(kit)) as session, Mirror(config, report, None) as mirror:
        run = secrets.token_hex(8)
        return _Submission(session, kit, config, run, mirror, patience).carry(resumes=False)


def resume_on_nvflare(
    config: Config,
    directory: RunDirectory,
    callbacks: Callbacks,
    report: Report,
    connect: Connect = connect,
    patience: Patience = Patience(),
) -> Result:
    """Go on with a run after its last commit, the server's or this directory's.

    Args:
        config: as the run began.
        directory: of the run; whoever opened it closes it.
        callbacks, report, connect, patience: see `run_on_nvflare`.
    """
    _refuse_callbacks(callbacks)
    kit = read_admin_kit(config.kit or "")
    with closing(connect(kit)) as session, Mirror(config, report, directory) as mirror:
        run = run_id(directory.path)
        submission = _Submission(
            session, kit, config, run or secrets.token_hex(8), mirror, patience
        )
        return submission.carry(resumes=run is not None)


def _refuse_callbacks(callbacks: Callbacks) -> None:
    if callbacks:
        raise InputError(
            "callbacks: rounds of engine: nvflare end at the server; listen to report instead"
        )


class _LostError(Exception):
    """A job has ended without its end; the text says what is known of it."""


class _Submission:
    """A run that is carried by one job after the other.

    Args:
        session: speaks to the server.
        kit: of the admin.
        config: of the run.
        run: its id.
        mirror: the run's directory here.
        patience: how long things are waited for.
    """

    def __init__(
        self,
        session: AdminSession,
        kit: AdminKit,
        config: Config,
        run: str,
        mirror: Mirror,
        patience: Patience,
    ) -> None:
        self.session, self.kit, self.config, self.run = session, kit, config, run
        self.mirror, self.patience = mirror, patience
        self.name = f"fedlora-{run}"

    def carry(self, resumes: bool) -> Result:
        """Carry the run to its end.

        Args:
            resumes: whether it has begun before.

        Raises:
            InputError: what was asked cannot be done; nothing was trained.
            FedloraError: it cannot go on.
        """
        job = self.session.running(self.name) if resumes else None
        lost, reached = 0, self.mirror.rounds
        while True:
            self.mirror.next_job()
            if job is None:
                job = self._submitted(resumes, wait=lost > 0)
            try:
                outcome = self._followed(job)
                break
            except _LostError as error:
                job = None
                lost = 1 if self.mirror.rounds > reached else lost + 1
                reached, resumes = self.mirror.rounds, resumes or self.mirror.heard
                if lost > MOST_LOST or not resumes:
                    raise FedloraError(self._gave_up(error, resumes)) from None
                self._warn(f"{error}; it is submitted again, and goes on after its last round")
        if outcome.kind == "ended":
            return _result(self.mirror.path)
        if outcome.kind == "mistake":
            raise InputError(outcome.message)
        raise FedloraError(f"the run has stopped at the server: {outcome.message}")

    def _gave_up(self, error: _LostError, begun: bool) -> str:
        if not begun:
            return (
                f"{error}; the logs of the server and of the sites say why (is fedlora installed "
                "at all of them, with its classes in class_allow_list?)"
            )
        return (
            f"{error}, {MOST_LOST + 1} times without a round between them; go on later with: "
            f"fedlora run --resume {self.mirror.path}"
        )

    # --- submitting ---

    def _submitted(self, resumes: bool, wait: bool) -> str:
        """Submit a job; gives its id."""
        roster = self._roster()
        until = time.monotonic() + (self.patience.sites if wait else 0.0)
        while True:
            try:
                names, present = present_sites(self.config, roster, self.kit, self.session.sites())
                break
            except UnreachableError as error:
                if not wait:
                    raise
                self._waited_for_server(error)
            except InputError:
                if time.monotonic() > until:
                    raise
                time.sleep(self.patience.poll)
        settings = {**resolve_paths(self.config).flat(), "kit": None}
        order = Order(self.run, settings, names, resumes)
        saved = self.mirror.path if resumes and self.mirror.path.is_dir() else None
        with tempfile.TemporaryDirectory(prefix="fedlora-") as made:
            job = Path(made) / self.name
            write_job(job, order, present, saved)
            return self.session.submit(job)

    def _roster(self) -> Roster:
        path = self.mirror.path
        return roster_of(read_metrics(path)) if (path / METRICS).is_file() else Roster()

    # --- following ---

    def _followed(self, job: str) -> Outcome:
        """Follow a job to its end, and fetch what it leaves.

        Raises:
            _LostError: it did not come to its end.
        """
        try:
            outcome = self._outcome(job)
            fetched = self._fetched(job, self.patience.start)
        except _LostError:
            with suppress(FedloraError):
                self.session.abort(job)  # what is left of it
            raise
        except BaseException:
            self._give_up(job)
            raise
        outcome = outcome or fetched
        if outcome is None:
            raise _LostError(f"the job ended as {self._status(job)}")
        if outcome.kind == "lost":
            raise _LostError(outcome.message)
        return outcome

    def _outcome(self, job: str) -> Outcome | None:
        """How a job has told that it ended; None: it has ended, and told nobody."""
        heard = time.monotonic()
        while True:
            time.sleep(self.patience.poll)
            try:
                answer = self.session.ask(job, self.mirror.question())
            except NotRunningError as error:
                if has_ended(status := self._status(job)):
                    return None
                there = isinstance(error, SilentError) or not self.mirror.heard
                self._check_silence(heard, status, there)
            except UnreachableError as error:
                if self._waited_for_server(error):
                    heard = time.monotonic()
                self._check_silence(heard, "not reached", True)
            else:
                heard = time.monotonic()
                if (outcome := self.mirror.take(answer)) is not None:
                    return outcome

    def _check_silence(self, heard: float, status: str, there: bool) -> None:
        """Give up a job that was heard last at this moment, if that is too long ago.

        Args:
            heard: on the clock of `time.monotonic`.
            status: of the job.
            there: whether it may have a process.

        Raises:
            _LostError: it is.
        """
        limit = self.patience.start if there else self.patience.silence
        if time.monotonic() - heard > limit:
            what = "does not answer" if self.mirror.heard else "does not begin"
            raise _LostError(f"the job {what}; it is {status}")

    def _status(self, job: str) -> str:
        try:
            return self.session.status(job)
        except NotRunningError as error:
            return f"FINISHED: {error}"
        except UnreachableError as error:
            self._waited_for_server(error)
            return "unknown"

    def _waited_for_server(self, error: UnreachableError) -> bool:
        """Wait until the server answers; gives whether it did not at first.

        Raises:
            UnreachableError: it does not come back.
        """
        until = time.monotonic() + self.patience.server
        waited = False
        while True:
            try:
                self.session.sites()
                return waited
            except UnreachableError:
                if not waited:
                    self._warn(f"{error}; it is waited for")
                waited = True
                if time.monotonic() > until:
                    raise
                time.sleep(self.patience.poll)

    def _give_up(self, job: str) -> None:
        """Abort a job, and fetch what it has saved, so that the run can go on from here."""
        try:
            self.session.abort(job)
            self._fetched(job, self.patience.abort)
        except (FedloraError, _LostError) as error:
            self._warn(
                f"{error}; it may still run: nvflare job abort {job} --startup-kit {self.kit.path}"
            )

    def _fetched(self, job: str, seconds: float) -> Outcome | None:
        """Fetch the files of a job that ends; gives how it ended, if it came to its end.

        Raises:
            _LostError: it does not end in so many seconds.
        """
        until = time.monotonic() + seconds
        while not has_ended(status := self._status(job)):
            if time.monotonic() > until:
                raise _LostError(f"the job is {status} and does not end")
            time.sleep(self.patience.poll)
        parent = self.mirror.path.parent
        parent.mkdir(parents=True, exist_ok=True)
        fetched = Path(tempfile.mkdtemp(prefix=f".{self.mirror.path.name}.", dir=parent))
        try:
            workspace = self.session.download(job, fetched)
            self.mirror.install(workspace / RESULT)
            return read_outcome(workspace)
        finally:
            shutil.rmtree(fetched, ignore_errors=True)

    def _warn(self, message: str) -> None:
        self.mirror.tell(Notice(event="warning", message=message))


def _result(path: Path) -> Result:
    """What a run returns, of the files that it has left."""
    lines, final = read_metrics(path), path / FINAL
    end = next(line for line in reversed(lines) if line["event"] == "end")
    return Result(path, final, load_adapter(final).deltas, lines, end["best"])
