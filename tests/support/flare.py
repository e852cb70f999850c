"""NVIDIA FLARE without its network: the controller and the executors of a job in this process.

FLARE's own task management hands out the tasks, and everything passes through its serialisation.
Sites in memory (`support.sites`) answer on Unix sockets, as workers do.
"""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.app_common.decomposers.numpy_decomposers import NumpyArrayDecomposer
from nvflare.fuel.utils import fobs

from fedlora.config.config import Config
from fedlora.engines.nvflare.controller import CourseController
from fedlora.engines.nvflare.executor import SiteExecutor
from fedlora.engines.nvflare.feed import FEED
from fedlora.engines.nvflare.kit import OWN_FILE, AdminKit
from fedlora.engines.nvflare.session import NotRunningError
from fedlora.engines.nvflare.submit import Patience, resume_on_nvflare, run_on_nvflare
from fedlora.engines.site_errors import told_to_server
from fedlora.engines.site_listener import Listener
from fedlora.runs.directory import RunDirectory
from fedlora.runs.events import Report, ignore
from fedlora.runs.results import Result
from fedlora.runs.resume import as_it_began
from support.sites import SiteInMemory

JOB = "11111111-2222-3333-4444-555555555555"


def carried(parcel: Shareable) -> Shareable:
    """What comes out at the other end of FLARE's network."""
    flare_decomposers.register()
    fobs.register(NumpyArrayDecomposer)
    return fobs.loads(fobs.dumps(parcel))


@dataclass
class Workspace:
    """A kit and a job in it, as FLARE names their directories."""

    kit: Path
    job: Path

    def get_root_dir(self) -> str:
        return str(self.kit)

    def get_run_dir(self, job: str) -> str:
        return str(self.job)

    def get_audit_file_path(self) -> str:
        return str(self.kit / "audit.log")

    def get_app_config_dir(self, job: str) -> str:
        return str(self.job / "app_server" / "config")


class Engine:
    """What FLARE's engines of the server and of a site are to the code of a job."""

    def __init__(self, name: str, workspace: Workspace) -> None:
        self.workspace = workspace
        self.contexts = FLContextManager(engine=self, identity_name=name, job_id=JOB)
        self.aside: dict[str, Callable[..., Shareable]] = {}
        self.commands: dict[str, Callable[..., dict[str, Any]]] = {}
        self.sites: Sequence[Site] = ()

    @contextmanager
    def new_context(self) -> Iterator[FLContext]:
        yield self.contexts.new_context()

    def get_workspace(self) -> Workspace:
        return self.workspace

    def get_clients(self) -> list[Client]:
        return [site.client for site in self.sites]

    def fire_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Nobody listens here."""

    def register_aux_message_handler(
        self, topic: str, message_handle_func: Callable[..., Shareable]
    ) -> None:
        self.aside[topic] = message_handle_func

    def register_app_command(self, topic: str, function: Callable[..., dict[str, Any]]) -> None:
        self.commands[topic] = function

    def send_aux_request(
        self,
        targets: Sequence[str],
        topic: str,
        request: Shareable,
        timeout: float,
        fl_ctx: FLContext,
        optional: bool = False,
    ) -> Mapping[str, Shareable]:
        replies = {}
        for site in self.sites:
            if site.client.name in targets:
                with site.engine.new_context() as context:
                    answer = site.engine.aside[topic](topic, carried(request), context)
                replies[site.client.name] = carried(answer)
        return replies


class Site:
    """FLARE's client process of a site, whose worker answers on a socket.

    Args:
        name: of the site.
        directory: for its kit and its socket.
        worker: the site in memory.
    """

    def __init__(self, name: str, directory: Path, worker: SiteInMemory) -> None:
        path = directory / f"{name}.sock"
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(path))
        self.listening.listen()
        Listener(self.listening, _Worker(worker), None).start()
        kit = directory / name
        _own_file(kit, {"socket": str(path)})
        self.client, self.executor = Client(name, name), SiteExecutor()
        self.engine = Engine(name, Workspace(kit, kit / JOB))
        self.aborted = Signal()
        with self.engine.new_context() as context:
            self.executor.handle_event(EventType.START_RUN, context)

    def serve(self, communicator: WFCommServer, server: Engine) -> None:
        """Ask for tasks, and do them, until the job ends."""
        while not self.aborted.triggered:
            with server.new_context() as context:
                name, number, data = communicator.process_task_request(self.client, context)
            if not name:
                threading.Event().wait(0.005)
                continue
            with self.engine.new_context() as context:
                result = self.executor.execute(name, carried(data), context, self.aborted)
            with server.new_context() as context:
                communicator.process_submission(self.client, name, number, carried(result), context)


@dataclass
class _Worker:
    """What a listener calls."""

    site: SiteInMemory

    def handle(self, message: bytes, seconds: float | None) -> bytes:
        with told_to_server():
            return self.site.answer(message)

    def status(self) -> dict[str, Any]:
        return self.site.service.status()

    def cancel(self) -> None:
        self.site.service.cancel()

    def stop(self) -> None:
        """It ends with the test."""


@dataclass
class Flare:
    """A federation of FLARE to its admin: an `AdminSession`, whose server runs a job at a time.

    Args:
        directory: for the kits and the jobs.
        workers: site -> what answers there.
    """

    directory: Path
    workers: dict[str, SiteInMemory]
    jobs: dict[str, Job] = field(default_factory=dict)

    @property
    def admin(self) -> Path:
        """The kit of an admin."""
        kit = self.directory / "admin"
        (kit / "startup").mkdir(parents=True, exist_ok=True)
        told = {"username": "lead@hub.org", "host": "localhost", "port": 8003}
        (kit / "startup" / "fed_admin.json").write_text(json.dumps({"admin": told}))
        return kit

    @property
    def runs(self) -> Path:
        """Where the server keeps runs."""
        return self.directory / "runs"

    @property
    def audit(self) -> Path:
        """The server's audit log."""
        return self.directory / "server" / "audit.log"

    def connect(self, kit: AdminKit) -> Flare:
        """Log in."""
        assert kit.path == self.admin
        return self

    def sites(self) -> Sequence[str]:
        return sorted(self.workers)

    def submit(self, job: Path) -> str:
        kit = self.directory / "server"
        _own_file(kit, {"runs": str(self.runs)})
        self.audit.touch()
        number = f"job-{len(self.jobs) + 1}"
        workspace = Workspace(kit, self.directory / number)
        shutil.copytree(job, workspace.job)
        self.jobs[number] = Job(job.name, workspace, self.workers)
        return number

    def running(self, name: str) -> str | None:
        names = (n for n, job in self.jobs.items() if job.name == name and not job.over.is_set())
        return next(names, None)

    def status(self, job: str) -> str:
        return self.jobs[job].status

    def ask(self, job: str, question: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.jobs[job].ask(question)

    def abort(self, job: str) -> None:
        with self.audit.open("a") as file:
            file.write(f"[E:1][T:now][U:lead@hub.org][A:abort_job {JOB}]\n")
        self.jobs[job].aborted.trigger(True)

    def download(self, job: str, to: Path) -> Path:
        return Path(shutil.copytree(self.jobs[job].workspace.job, to / job))

    def close(self) -> None:
        for job in self.jobs.values():
            job.thread.join()


class Job:
    """A job that runs, from now on.

    Args:
        name: of the job.
        workspace: at the server.
        workers: site -> what answers there.
    """

    def __init__(
        self, name: str, workspace: Workspace, workers: Mapping[str, SiteInMemory]
    ) -> None:
        self.name, self.workspace, self.workers = name, workspace, workers
        self.aborted, self.over, self.panics = Signal(), threading.Event(), list[str]()
        self.engine, self.controller = Engine("server", workspace), CourseController()
        self.controller.system_panic = lambda reason, fl_ctx: self.panics.append(reason)
        self.communicator = WFCommServer()
        self.controller.set_communicator(self.communicator)
        self.failure: Exception | None = None
        self.killed = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    @property
    def status(self) -> str:
        if not self.over.is_set():
            return "RUNNING"
        return "FINISHED:EXECUTION_EXCEPTION" if self.panics or self.failure else "FINISHED"

    def ask(self, question: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.over.is_set() or FEED not in self.engine.commands:
            raise NotRunningError("it does not run")
        with self.engine.new_context() as context:
            answer = self.engine.commands[FEED](FEED, json.loads(json.dumps(question)), context)
        return json.loads(json.dumps(answer))  # type: ignore[no-any-return]

    def kill(self) -> None:
        """End it as a process is killed: what it would leave at its end is not there."""
        self.killed = True
        self.aborted.trigger(True)
        self.thread.join()

    def _run(self) -> None:
        # A socket's path has to be short.
        with tempfile.TemporaryDirectory(prefix="f") as short:
            sites = [Site(name, Path(short), x) for name, x in self.workers.items()]
            self.engine.sites = sites
            with self.engine.new_context() as context:
                self.communicator.initialize_run(context)
                self.controller.initialize(context)
            threads = [
                threading.Thread(target=site.serve, args=(self.communicator, self.engine))
                for site in sites
            ]
            for thread in threads:
                thread.start()
            try:
                with self.engine.new_context() as context:
                    self.controller.control_flow(self.aborted, context)
            except Exception as error:
                self.failure = error
            finally:
                for site in sites:
                    site.aborted.trigger(True)
                for thread in threads:
                    thread.join()
                with self.engine.new_context() as context:
                    self.communicator.finalize_run(context)
                for site in sites:
                    site.listening.close()
                if self.killed:
                    shutil.rmtree(self.workspace.job)
                    self.workspace.job.mkdir()
                self.over.set()


def _own_file(kit: Path, values: Mapping[str, Any]) -> None:
    (kit / OWN_FILE).parent.mkdir(parents=True, exist_ok=True)
    (kit / OWN_FILE).write_text(json.dumps(values))


def submitted(
    keys: Mapping[str, Any],
    out: Path,
    flare: Flare,
    report: Report = ignore,
    patience: Patience | None = None,
) -> Result:
    """A whole run over such a federation."""
    plain = {key: x for key, x in keys.items() if key not in ("train_file", "cohort_size")}
    own = {"engine": "nvflare", "kit": str(flare.admin), "output_dir": str(out)}
    config = Config(**{**plain, **own})
    return run_on_nvflare(config, (), report, flare.connect, patience or QUICK)


def resumed(
    out: Path, flare: Flare, report: Report = ignore, patience: Patience | None = None
) -> Result:
    """Go on with a run over such a federation."""
    own = {"engine": "nvflare", "kit": str(flare.admin)}
    directory = RunDirectory.open(out)
    try:
        config = as_it_began(directory.path, None).model_copy(update=own)
        return resume_on_nvflare(config, directory, (), report, flare.connect, patience or QUICK)
    finally:
        directory.close()


QUICK = Patience(poll=0.02)
