"""Brings messages to sites as tasks of NVIDIA FLARE: a `Transport` in the server's job process.

One task for each site and message, so that every site has its own content, its own deadline and its
own end; a task whose answer nobody waits for any more is cancelled.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from nvflare.apis.controller_spec import ClientTask, Task, TaskCompletionStatus
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable

from fedlora.engines.carrier import SiteError
from fedlora.engines.nvflare.kit import TASK
from fedlora.engines.nvflare.parcels import CANCEL, STATUS, TOLD, pack, unpack_answer
from fedlora.engines.transport import Answer

_GRACE = 1.0  # seconds after a deadline in which a site may say itself that it has passed
_LOOK = 0.2  # seconds between two looks at whether the job is aborted
_QUICK = 5.0  # seconds for what needs no training
_PULSE = 15.0  # seconds between two looks at whether a site that has not answered is there
_SILENT = 4  # looks in a row that find nothing of a site, before it counts as gone

_Answers = SimpleQueue[tuple[str, Answer]]


class NvflareTransport:
    """Reaches the sites that run in this job.

    Args:
        controller: sends the tasks.
        engine: FLARE's, of the job.
        names: all sites of the run.
        present: those that the job was deployed to.
        aborted: whether the job is to end.
    """

    def __init__(
        self,
        controller: Controller,
        engine: Any,
        names: Sequence[str],
        present: Sequence[str],
        aborted: Callable[[], bool],
    ) -> None:
        self.controller, self.engine, self.aborted = controller, engine, aborted
        self._names, self.present = sorted(names), frozenset(present)
        self._gone = set[str]()

    def names(self) -> Sequence[str]:
        """The sites of the run in the order of their names."""
        return self._names

    def send(
        self, messages: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Answer]]:
        """Send a task to every site; see `Transport.send`."""
        answers = _Answers()
        tasks = dict[str, Task]()
        self._gone -= set(self._there([name for name in messages if name in self._gone]))
        for name, message in messages.items():
            if name not in self.present:
                yield name, SiteError("absent", "it takes no part in this job; it was not there")
            elif name in self._gone:
                yield name, SiteError("absent", "it has no part in this job any more")
            else:
                tasks[name] = self._send(name, message, deadline, answers)
        over = threading.Event()
        threading.Thread(
            target=self._watch, args=(tasks, answers, over), name="pulse", daemon=True
        ).start()
        try:
            while tasks:
                answer = self._next(answers, deadline)
                if answer is None:
                    break
                if tasks.pop(answer[0], None) is not None:
                    yield answer
            for name in sorted(tasks):
                yield name, self._why_nothing_came()
        finally:
            over.set()
            for task in tasks.values():
                self.controller.cancel_task(task)

    def _watch(self, tasks: Mapping[str, Task], answers: _Answers, over: threading.Event) -> None:
        """Answer for sites of which nothing is left in the job.

        FLARE does not miss a site that was restarted at once: it has registered again, but no
        process of it takes part in the job, and its task is never fetched.
        """
        silent = Counter[str]()
        while not over.wait(_PULSE):
            waited_for = sorted(tasks)
            there = self._there(waited_for)
            for name in waited_for:
                silent[name] = 0 if name in there else silent[name] + 1
                if silent[name] == _SILENT:
                    self._gone.add(name)
                    reason = "nothing is left of it in this job; was the site restarted?"
                    answers.put((name, SiteError("died", reason)))

    def _there(self, names: Sequence[str]) -> Collection[str]:
        """Those of the sites whose job process answers."""
        replies = self._ask_aside(list(names), STATUS)
        return {
            name
            for name, reply in replies.items()
            if isinstance(reply, Shareable) and reply.get_return_code() == ReturnCode.OK
        }

    def _send(self, name: str, message: bytes, deadline: float | None, answers: _Answers) -> Task:
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        task = Task(
            name=TASK,
            data=pack(message, seconds),
            result_received_cb=partial(_on_answer, answers),
            task_done_cb=partial(_on_end, answers, name),
        )
        with self.engine.new_context() as fl_ctx:
            self.controller.send(task=task, fl_ctx=fl_ctx, targets=[name])
        return task

    def _next(self, answers: _Answers, deadline: float | None) -> tuple[str, Answer] | None:
        """The next answer; None: the time is over, or the job ends."""
        while not self.aborted():
            left = _LOOK if deadline is None else deadline + _GRACE - time.monotonic()
            try:
                return answers.get(timeout=max(0.0, min(_LOOK, left)))
            except Empty:
                if left <= 0:
                    return None
        return None

    def _why_nothing_came(self) -> SiteError:
        if self.aborted():
            return SiteError("died", "the job was aborted")
        return SiteError("deadline", "it did not answer by the deadline")

    def cancel(self, names: Sequence[str]) -> None:
        """Have the sites' workers told; see `Transport.cancel`."""
        self._ask_aside([name for name in names if name in self.present], CANCEL)

    def status(self, name: str) -> Mapping[str, Any]:
        """How far the training at a site is; empty where it cannot be told."""
        if name not in self.present or self.aborted():
            return {}
        reply = self._ask_aside([name], STATUS).get(name)
        if not isinstance(reply, Shareable) or reply.get_return_code() != ReturnCode.OK:
            return {}
        return {key: reply[key] for key in TOLD if key in reply}

    def _ask_aside(self, names: list[str], topic: str) -> Mapping[str, Any]:
        """What sites answer while they are at a message."""
        if not names:
            return {}
        with self.engine.new_context() as fl_ctx:
            replies = self.engine.send_aux_request(
                targets=names,
                topic=topic,
                request=Shareable(),
                timeout=_QUICK,
                fl_ctx=fl_ctx,
                optional=True,
            )
        return replies if isinstance(replies, Mapping) else {}

    def close(self) -> None:
        """FLARE ends what is left with the job."""


# FLARE calls these by keyword; a parameter of another name is an error that it only logs.


def _on_answer(answers: _Answers, client_task: ClientTask, fl_ctx: FLContext) -> None:
    answer: Answer
    try:
        answer = unpack_answer(client_task.result)
    except SiteError as error:
        answer = error
    client_task.result = None  # the task is kept for a while, and need not hold a model
    answers.put((client_task.client.name, answer))


def _on_end(answers: _Answers, name: str, task: Task, fl_ctx: FLContext) -> None:
    """Tell of a site that FLARE has lost; all other ends are known already."""
    if task.completion_status == TaskCompletionStatus.CLIENT_DEAD:
        answers.put((name, SiteError("died", "the server has lost the connection to the site")))
    elif task.completion_status == TaskCompletionStatus.ERROR:
        answers.put((name, SiteError("failed", "the server's log says more")))
