"""Makes several runs at a time, within the cores and the memory there are, and keeps them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.commands.study.plan import Planned
from fedlora.errors import InputError
from fedlora.runs.file_names import CONFIG, FINAL

OnChange = Callable[[str, Planned, Mapping[str, Any]], None]
"""Called as `(what, run, message)`: what is start, round, done, failed, or kept (done before)."""

_FIRST_NEED = 2 * 2**30
"""Bytes a run is taken to need at least; the libraries alone take a part of it."""


@dataclass
class _Worker:
    process: subprocess.Popen[str]
    run: Planned | None = None


def threads_and_processes(processes: int | None, gpu: bool) -> tuple[int, int]:
    """Threads of a process, and how many processes: together no more than there are cores.

    Args:
        processes: as asked for; None: one on a GPU, else one for each core.
        gpu: whether runs use one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    number = processes or (1 if gpu else cores or 1)
    return max(1, (cores or 1) // number), number


def check_kept(runs: Sequence[Planned], directory: Path) -> None:
    """Refuse to mix runs of other settings into a study's table.

    Raises:
        InputError: a run in the directory was made with settings other than those of today.
    """
    from fedlora.runs.resume import as_it_began

    for planned in runs:
        path = directory / planned.directory
        if planned.alone is None and (path / CONFIG).is_file():
            try:
                as_it_began(path, planned.config(path))
            except InputError as error:
                raise InputError(
                    f"{path}: made with other settings than this study has now; remove it, or give "
                    f"another --output_dir\n{error}"
                ) from None


def execute(
    runs: Sequence[Planned],
    directory: Path,
    *,
    processes: int | None,
    gpu: bool,
    on_change: OnChange,
    small: bool = False,
) -> dict[str, str]:
    """Make all runs that are not complete, each in its own directory.

    Args:
        runs: in the order they are started.
        directory: of the runs' directories.
        processes: how many at a time; None: as `threads_and_processes` says. The first run has
            a round to itself, which shows what memory it takes; the others start where the
            machine's free memory holds as much.
        gpu: whether runs use one.
        on_change: called when a run changes its state.
        small: a run is known to need little memory, so none has to show it first.

    Returns:
        Directory name -> why this run failed. The others are complete.
    """
    waiting = _incomplete(runs, directory, on_change)
    failed: dict[str, str] = {}
    pool = _Pool(directory, *threads_and_processes(processes, gpu), known=small)
    try:
        while waiting or pool.busy:
            while waiting and pool.has_room():
                run = waiting.pop(0)
                pool.start(run)
                on_change("start", run, {})
            news = pool.next_message()
            if news is None:
                continue
            run, message = news
            if "round" in message:
                on_change("round", run, message)
            elif message.get("done"):
                on_change("done", run, message)
            else:
                failed[run.directory] = message["failed"]
                on_change("failed", run, {"failed": message["failed"]})
    finally:
        pool.stop()
    return failed


def _incomplete(runs: Sequence[Planned], directory: Path, on_change: OnChange) -> list[Planned]:
    """The runs that have to be made, each once; the others were kept."""
    waiting: dict[str, Planned] = {}
    kept = set()
    for run in runs:
        if run.directory in waiting or run.directory in kept:
            continue
        if (directory / run.directory / FINAL).is_dir():
            kept.add(run.directory)
            on_change("kept", run, {})
        else:
            waiting[run.directory] = run
    return list(waiting.values())


class _Pool:
    """Processes that make runs, one at a time each.

    Args:
        directory: of the runs' directories.
        threads: of a process.
        most: processes at a time.
        known: what memory a run needs is known; else the first run shows it, by itself.
    """

    def __init__(self, directory: Path, threads: int, most: int, known: bool) -> None:
        self._directory, self._threads, self._most = directory, threads, most
        self._known, self._need = known, _FIRST_NEED
        self._workers: list[_Worker] = []
        self._messages: queue.Queue[tuple[_Worker, dict[str, Any]]] = queue.Queue()

    @property
    def busy(self) -> bool:
        """Whether a run is being made."""
        return any(worker.run for worker in self._workers)

    def has_room(self) -> bool:
        """Whether another run may start now."""
        return _may_start(self._workers, self._most if self._known else 1, self._need)

    def start(self, run: Planned) -> None:
        """Give a run to a process that has none, or to a new one."""
        worker = next((w for w in self._workers if w.run is None), None)
        if worker is None:
            worker = _new_worker(self._threads, self._directory, self._messages)
            self._workers.append(worker)
        _send(worker, run, self._directory, self._threads)

    def next_message(self) -> tuple[Planned, dict[str, Any]] | None:
        """Wait for what a process says of its run: `round`, `done`, or `failed` with the reason.

        Returns:
            None where a process ended that had nothing to do.
        """
        worker, message = self._messages.get()
        run = worker.run
        if run is None:
            return None
        if "peak" in message:  # one run shows what the others need beside it
            self._need, self._known = max(self._need, int(message["peak"])), True
        if "round" in message:
            return run, message
        worker.run, self._known = None, True
        if not message.get("done") and "failed" not in message:  # it said nothing, and is gone
            self._workers.remove(worker)
        if not message.get("done") and not message.get("failed"):
            message = {**message, "failed": _end_of(worker.process, self._directory)}
        return run, message

    def stop(self) -> None:
        """End all processes."""
        _stop(self._workers)


def _end_of(process: subprocess.Popen[str], directory: Path) -> str:
    """How a process ended that did not say so itself."""
    code = process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"its process {how}; see {directory / 'worker.log'}"


def _may_start(workers: Sequence[_Worker], most: int, need: int) -> bool:
    """Whether cores and memory hold another run beside those that are being made."""
    import torch

    from fedlora.client.memory import memory_available

    busy = sum(worker.run is not None for worker in workers)
    if busy == 0:
        return True
    if busy >= most:
        return False
    if any(worker.run is None for worker in workers):
        return True  # an idle process holds its memory already
    return memory_available(torch.device("cpu")) > need * 5 // 4


def _new_worker(
    threads: int, directory: Path, answers: queue.Queue[tuple[_Worker, dict[str, Any]]]
) -> _Worker:
    """A process that makes runs; what it says goes into the queue of answers."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "worker.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedlora.commands.study.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **counts},
            start_new_session=True,  # Ctrl-C reaches us alone; we tell them
        )
    worker = _Worker(process)

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put((worker, json.loads(line)))
        answers.put((worker, {}))

    threading.Thread(target=listen, daemon=True).start()
    return worker


def _send(worker: _Worker, planned: Planned, directory: Path, threads: int) -> None:
    """Tell a process which run to make."""
    worker.run = planned
    job = {
        "path": str(directory / planned.directory),
        "keys": {"num_threads": threads, **planned.keys, "seed": planned.seed},
        "alone": planned.alone,
        "trainer": planned.trainer,
    }
    assert worker.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its end is told by its output, like any other
        worker.process.stdin.write(json.dumps(job) + "\n")
        worker.process.stdin.flush()


def _stop(workers: Sequence[_Worker]) -> None:
    """End processes: those at work are stopped, the others have nothing more to wait for."""
    for worker in workers:
        if worker.run is not None:
            worker.process.terminate()
        elif worker.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                worker.process.stdin.close()
    for worker in workers:
        try:
            worker.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            worker.process.kill()
