"""Takes a run through its rounds in the job process of NVIDIA FLARE's server.

The course is that of every run (`fedlora.runs.course`), the engine that of all sites
(`fedlora.engines.sites`); FLARE brings the messages. The run lies in a directory of the server's
kit, outside of the job, so that another job goes on with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedlora.config.config import Config
from fedlora.engines.nvflare.audit import log_size, who_aborted
from fedlora.engines.nvflare.feed import FEED, Feed, Outcome, write_outcome
from fedlora.engines.nvflare.hosting import RESULT, configuration, host, publish
from fedlora.engines.nvflare.order import read_order, saved_in
from fedlora.engines.nvflare.transport import NvflareTransport
from fedlora.engines.site_calls import SiteCalls
from fedlora.errors import FedloraError, InputError
from fedlora.runs.events import Event

_PATIENCE = 10.0  # seconds for the admin to take the last of what was told
_LOOK = 0.2  # seconds between two looks at whether the job is to end


class CourseController(Controller):  # type: ignore[misc]
    """A workflow of FLARE that is a whole run."""

    def __init__(self) -> None:
        super().__init__(task_check_period=0.05)
        self._feed = Feed()
        self._over = threading.Event()
        self._audit, self._audited = Path(), 0

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Answer the admin from now on."""
        engine = fl_ctx.get_engine()
        self._audit = Path(engine.get_workspace().get_audit_file_path())
        self._audited = log_size(self._audit)
        engine.register_app_command(FEED, self._on_question)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing was opened that outlives `control_flow`."""

    def process_result_of_unknown_task(
        self,
        client: Client,
        task_name: str,
        client_task_id: str,
        result: Shareable,
        fl_ctx: FLContext,
    ) -> None:
        """Drop an answer that nobody waits for any more."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run what the job orders, tell how it ended, and leave its files as the job's result."""
        result = _result_of(fl_ctx)
        run, failure = list[Path](), None
        try:
            outcome = self._outcome(abort_signal, fl_ctx, run.append)
        except Exception as error:
            outcome, failure = Outcome("failed", f"{type(error).__name__}: {error}"), error
        self._over.set()
        if run:
            publish(run[0], result / RESULT)
        write_outcome(result, outcome)
        self._feed.end(outcome, 0.0 if abort_signal.triggered else _PATIENCE)
        if failure is not None:
            raise failure
        if outcome.kind in ("mistake", "failed"):
            self.system_panic(outcome.message, fl_ctx)

    def _outcome(
        self, abort_signal: Signal, fl_ctx: FLContext, begun: Callable[[Path], None]
    ) -> Outcome:
        """How the run ends that the job orders."""

        def report(event: Event) -> None:
            self._feed.tell(event)
            if abort_signal.triggered:
                raise KeyboardInterrupt

        def note(path: Path) -> None:
            begun(path)
            self._feed.of(path)

        try:
            workspace = fl_ctx.get_engine().get_workspace()
            parameters = Path(workspace.get_app_config_dir(fl_ctx.get_job_id()))
            order = read_order(parameters)
            config = configuration(order, Path(workspace.get_root_dir()))
            make = self._making(order.sites, abort_signal, fl_ctx)
            host(order, config, saved_in(parameters), make, report, note)
        except KeyboardInterrupt:
            return self._aborted(fl_ctx)
        except FedloraError as error:
            if abort_signal.triggered:  # sites that nobody asks any more seem to be absent
                return self._aborted(fl_ctx)
            return Outcome("mistake" if isinstance(error, InputError) else "failed", str(error))
        return Outcome("ended")

    def _aborted(self, fl_ctx: FLContext) -> Outcome:
        """How a run ends whose job was aborted."""
        try:
            admin = who_aborted(self._audit, fl_ctx.get_job_id(), self._audited)
        except OSError as error:
            return Outcome("stopped", f"the job was aborted; who has done it is unknown: {error}")
        if admin is not None:
            return Outcome("stopped", f"the job was aborted by {admin}")
        return Outcome("lost", "NVIDIA FLARE has aborted the job, and no admin asked for it")

    def _making(
        self, names: Any, abort_signal: Signal, fl_ctx: FLContext
    ) -> Callable[[Config, Callable[[str], None]], SiteCalls]:
        """What makes the calls to the sites."""
        engine = fl_ctx.get_engine()

        def aborted() -> bool:
            return bool(abort_signal.triggered)

        def make(config: Config, tell: Callable[[str], None]) -> SiteCalls:
            present = [client.name for client in engine.get_clients()]
            transport = NvflareTransport(self, engine, names, present, aborted)
            calls = SiteCalls(transport, tell)
            threading.Thread(
                target=self._watch,
                args=(aborted, calls, tell, fl_ctx),
                name="abort-watch",
                daemon=True,
            ).start()
            return calls

        return make

    def _watch(
        self,
        aborted: Callable[[], bool],
        calls: SiteCalls,
        tell: Callable[[str], None],
        fl_ctx: FLContext,
    ) -> None:
        """End the waiting of all threads when the job is aborted.

        What is told here reaches `report` in the thread of the course, and ends that. How the job
        ends is written down at once: FLARE kills it soon.
        """
        while not self._over.wait(_LOOK):
            if aborted():
                write_outcome(_result_of(fl_ctx), self._aborted(fl_ctx))
                calls.close()
                tell("the job is aborted")
                return

    def _on_question(
        self, topic: str, data: Mapping[str, Any] | None, fl_ctx: FLContext
    ) -> dict[str, Any]:
        return self._feed.answer(data)


def _result_of(fl_ctx: FLContext) -> Path:
    """Where FLARE takes the job's result from."""
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
