"""Speaks to the server of a federation as an admin: submits jobs, asks, aborts, downloads."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Protocol

from fedlora.engines.nvflare.kit import ADMIN_RIGHT, AdminKit
from fedlora.errors import FedloraError, InputError

_CONNECT = 10.0  # seconds to reach the server and to log in
_COMMAND = 20.0  # seconds for a command to be answered
_LATELY = 60.0  # seconds since its last heartbeat for which a site counts as connected


class UnreachableError(FedloraError):
    """The server cannot be reached now; it may be back in a moment."""


class NotRunningError(FedloraError):
    """The job does not run: it has not begun, or has ended, or was lost."""


class SilentError(NotRunningError):
    """The job's process is there and does not answer: it begins, ends, or is busy."""


class AdminSession(Protocol):
    """What submitting a run needs of a federation.

    Every method raises UnreachableError where the server cannot be reached.
    """

    def sites(self) -> Sequence[str]:
        """The sites that are connected to the server, in the order of their names."""

    def submit(self, job: Path) -> str:
        """Submit a job, given its directory; gives the job's id.

        Raises:
            InputError: this admin may not.
        """

    def running(self, name: str) -> str | None:
        """The id of a job of this name that has not ended; None: there is none."""

    def status(self, job: str) -> str:
        """The status of a job, as `nvflare.apis.job_def.RunStatus` names them."""

    def ask(self, job: str, question: Mapping[str, Any]) -> Mapping[str, Any]:
        """Ask a job what is new (`fedlora.engines.nvflare.feed`).

        Raises:
            NotRunningError: it does not run.
        """

    def abort(self, job: str) -> None:
        """Abort a job; nothing happens where it has ended."""

    def download(self, job: str, to: Path) -> Path:
        """Download a job's result into a directory; gives the directory of its workspace."""

    def close(self) -> None:
        """Log out."""


Connect = Callable[[AdminKit], AdminSession]
"""Logs in to a federation's server."""


def connect(kit: AdminKit) -> AdminSession:
    """Log in to the server that a kit belongs to.

    Raises:
        InputError: nvflare is not installed, or the server does not let this admin in.
        UnreachableError: it cannot be reached.
    """
    try:
        import nvflare  # noqa: F401
    except ImportError:
        raise InputError(
            "engine: nvflare needs NVIDIA FLARE; install it with: pip install 'fedlora[nvflare]'"
        ) from None
    # What goes wrong is raised and told; what FLARE logs beside it would tear our output apart.
    logging.getLogger("nvflare").setLevel(logging.CRITICAL)
    return FlareSession(kit)


class FlareSession:
    """A session of NVIDIA FLARE's API, opened again after it was lost.

    Args:
        kit: of the admin.
    """

    def __init__(self, kit: AdminKit) -> None:
        self.kit = kit
        self._session: Any = None
        self._opened()

    def _opened(self) -> Any:
        if self._session is None:
            from nvflare.fuel.flare_api import api_spec, flare_api

            try:
                with redirect_stdout(io.StringIO()):  # FLARE greets whoever logs in
                    self._session = flare_api.new_secure_session(
                        self.kit.user,
                        str(self.kit.path),
                        timeout=_CONNECT,
                        command_timeout=_COMMAND,
                        auto_login_max_tries=1,
                    )
            except (api_spec.AuthenticationError, api_spec.AuthorizationError) as error:
                raise InputError(
                    f"kit: {self.kit.path}: the server at {self.kit.server} does not let "
                    f"{self.kit.user} in: {error}"
                ) from None
            except Exception as error:  # FLARE raises what its transport raises, of many kinds
                raise UnreachableError(
                    f"kit: {self.kit.path}: the server at {self.kit.server} cannot be reached; is "
                    "it running, and does it belong to the federation of this kit? "
                    f"({type(error).__name__}: {error})"
                ) from None
        return self._session

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        """A session, which is opened anew next time if it breaks.

        Raises:
            UnreachableError: it broke.
        """
        from nvflare.fuel.flare_api import api_spec

        session = self._opened()
        try:
            yield session
        except NotRunningError:
            raise
        except (
            api_spec.JobNotRunning,
            api_spec.JobNotDone,
            api_spec.JobNotFound,
        ) as error:
            raise NotRunningError(str(error)) from None
        except api_spec.AuthorizationError as error:
            raise InputError(self._unauthorized(str(error))) from None
        except (
            api_spec.NoConnection,
            api_spec.SessionClosed,
            api_spec.AuthenticationError,
            api_spec.InternalError,
            RuntimeError,
            OSError,
        ) as error:
            self.close()
            raise UnreachableError(
                f"the server at {self.kit.server} is not reached: {error}"
            ) from None

    def _unauthorized(self, error: str) -> str:
        if ADMIN_RIGHT in error:
            return (
                f"kit: {self.kit.user} may submit a run, but not follow it: the server's "
                f'local/authorization.json has to give this role "{ADMIN_RIGHT}": "n:submitter"'
            )
        return (
            f"kit: {self.kit.user} may not submit runs to this federation ({error}); its "
            "administrator can make a kit of another role for you"
        )

    def sites(self) -> Sequence[str]:
        """The sites whose heartbeat was heard lately."""
        with self._asking() as session:
            info = session.get_system_info()
        now = time.time()
        times = {x.name: x.last_connect_time for x in info.client_info}
        return sorted(n for n, last in times.items() if last is None or now - last < _LATELY)

    def submit(self, job: Path) -> str:
        """Submit a job; see `AdminSession.submit`."""
        with self._asking() as session:
            return str(session.submit_job(str(job)))

    def running(self, name: str) -> str | None:
        """The job of this name that has not ended; see `AdminSession.running`."""
        with self._asking() as session:
            jobs = session.list_jobs(name_prefix=name)
        for job in jobs:
            if job.get("job_name", job.get("name")) == name and not has_ended(job["status"]):
                return str(job["job_id"])
        return None

    def status(self, job: str) -> str:
        """The status of a job."""
        with self._asking() as session:
            return str(session.get_job_status(job))

    def ask(self, job: str, question: Mapping[str, Any]) -> Mapping[str, Any]:
        """Ask a job; see `AdminSession.ask`."""
        from nvflare.fuel.flare_api.api_spec import InternalError, NoReply

        from fedlora.engines.nvflare.feed import FEED

        with self._asking() as session:
            try:
                answer = session.do_app_command(job, FEED, dict(question))
            except (InternalError, NoReply, RuntimeError) as error:
                raise SilentError(str(error)) from None
        if not isinstance(answer, Mapping) or "events" not in answer:
            raise SilentError("the job does not answer")
        return answer

    def abort(self, job: str) -> None:
        """Abort a job."""
        with self._asking() as session:
            session.abort_job(job)

    def download(self, job: str, to: Path) -> Path:
        """Download a job's result; see `AdminSession.download`."""
        with self._asking() as session:
            return Path(session.download_job_result(job, str(to))) / "workspace"

    def close(self) -> None:
        """Log out."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(Exception):  # there is nobody to log out from where the server is gone
                session.close()


def has_ended(status: str) -> bool:
    """Whether a job of this status has ended, however it did."""
    return status.startswith("FINISHED")
