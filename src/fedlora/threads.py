"""Decides how many threads torch gets on a machine that others use too.

torch's threads wait for each other by spinning. Beside one busy process on two cores a round on two
threads takes up to twenty times as long as on one, so a run takes no more threads than there are
free cores. The number can change a run's last bits: it is written down wherever it changes, and a
resumed run goes on with it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

_STAT = Path("/proc/stat")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_QUOTA_1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_PERIOD_1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
WINDOW = 0.25
"""Seconds of a measurement at the start. Shorter ones say nothing: the kernel counts hundredths."""
_SLACK = 0.5
"""Cores that others may take of those wanted: a machine is never quite idle."""


@dataclass(frozen=True)
class Reading:
    """Clocks of one moment, in seconds.

    Args:
        time: of the wall.
        busy: that this process's cores have spent on anything, all cores together.
        own: that this process, its workers and its ended children have spent on any core.
    """

    time: float
    busy: float
    own: float


@dataclass(frozen=True)
class Room:
    """What there was for this process in a while.

    Args:
        cores: that it may use: its affinity, a container's limit.
        others: cores that others kept busy, on average.
    """

    cores: float
    others: float

    def threads(self, wanted: int) -> int:
        """As many as are wanted where they all have a core, else as many as have one."""
        free = self.cores - self.others
        return wanted if free >= wanted - _SLACK else max(1, int(free + _SLACK / 2))

    def __str__(self) -> str:
        return f"other processes keep {self.others:.1f} of {self.cores:.3g} cores busy"


def reading() -> Reading | None:
    """The clocks now; None on a system that does not tell (it has no /proc/stat)."""
    mine = {f"cpu{number}" for number in _affinity()}
    try:
        lines = [line.split() for line in _STAT.read_text().splitlines()]
        ticks = 0
        for name, *values in lines:
            if name in mine:
                user, nice, system, _, _, irq, softirq, *more = map(int, values)
                ticks += user + nice + system + irq + softirq + (more[0] if more else 0)
        per_second = os.sysconf("SC_CLK_TCK")
        own = sum(os.times()[:4]) + _ticks_of_workers() / per_second
        return Reading(time.monotonic(), ticks / per_second, own)
    except (OSError, ValueError, AttributeError):
        return None


def _ticks_of_workers() -> int:
    """What this run's live worker processes have spent; of ended ones `os.times` tells.

    Other programs that this process has started are others: they take cores from the run.
    """
    ticks = 0
    for child in multiprocessing.active_children():
        with suppress(OSError):  # it has just ended
            after_name = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += sum(map(int, after_name[11:15]))  # utime stime cutime cstime
    return ticks


def room(before: Reading | None, after: Reading | None) -> Room | None:
    """What there was between two readings; None where that is too short, or cannot be told."""
    if before is None or after is None or after.time - before.time < 0.8 * WINDOW:
        return None
    seconds = after.time - before.time
    others = (after.busy - before.busy - (after.own - before.own)) / seconds
    return Room(cores(), max(0.0, others))


def look(read: Callable[[], Reading | None] | None = None) -> Room | None:
    """What there is now, in a quarter of a second; what looks busy is looked at twice.

    Args:
        read: another source of readings.
    """
    read = read or reading
    least_busy: Room | None = None
    for _ in range(2):
        before = read()
        if before is None:
            return None
        time.sleep(WINDOW)
        now = room(before, read())
        if now is None or now.threads(max(1, int(now.cores))) >= int(now.cores):
            return now
        if least_busy is None or now.others < least_busy.others:
            least_busy = now
    return least_busy


def fewer(before: int, after: int, room: Room) -> str:
    """What a run says that takes fewer threads."""
    return (
        f"{after} thread{'s' * (after > 1)} instead of {before}: {room}, and threads without a "
        "core of their own hold up all others"
    )


def unchanged(number: int, better: int, room: Room) -> str:
    """What a run says that is told how many threads to take."""
    return (
        f"num_threads is {number}, and {room}: threads without a core of their own hold up all "
        f"others, and a round may take many times as long; num_threads {better} would be faster"
    )


class Watcher:
    """Between rounds: how many threads the next one takes. It never takes more again.

    Args:
        number: of the run so far.
        own: whether the run chose it; a number that was configured stays.
    """

    def __init__(self, number: int, own: bool) -> None:
        self.number, self.own = number, own
        self._before = reading() if own and number > 1 else None

    def look(self) -> str:
        """After a round: what to tell where there was no room for all threads, else nothing.

        Rounds too short to be measured are taken together.
        """
        if not self.own or self.number == 1:
            return ""
        now = reading()
        since = room(self._before, now)
        if since is None:
            return ""
        self._before = now
        fit = since.threads(self.number)
        if fit == self.number:
            return ""
        message, self.number = fewer(self.number, fit, since), fit
        return message


def cores() -> float:
    """Cores that this process may use: its affinity, or a container's limit where that is less."""
    return min(float(len(_affinity())), _quota())


def _affinity() -> set[int]:
    try:
        return set(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return set(range(os.cpu_count() or 1))


def _quota() -> float:
    """CPU seconds a second that the control group grants."""
    try:
        if _QUOTA.exists():
            most, period = _QUOTA.read_text().split()
        else:
            most, period = _QUOTA_1.read_text().strip(), _PERIOD_1.read_text().strip()
        return float("inf") if most in ("max", "-1") else max(1.0, int(most) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return float("inf")


_In = TypeVar("_In")
_Out = TypeVar("_Out")

_outside: ContextVar[int] = ContextVar("fedlora_threads_outside", default=1)
"""How many threads torch had where `one_thread` was entered; `map_modules` may use as many."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: on two, beside a busy core, a small SVD is a hundred times slower."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    token = _outside.set(before)
    try:
        yield
    finally:
        _outside.reset(token)
        torch.set_num_threads(before)


def map_modules(function: Callable[[_In], _Out], modules: Mapping[str, _In]) -> dict[str, _Out]:
    """`function` of every module's value, as many at a time as torch may use threads.

    Every module is worked on by one thread, so the number of threads changes no bit.
    """
    threads = min(max(torch.get_num_threads(), _outside.get()), len(modules))
    if threads <= 1:
        with one_thread():
            return {name: function(x) for name, x in modules.items()}
    with one_thread(), ThreadPoolExecutor(threads, initializer=_use_one_thread) as pool:
        return dict(zip(modules, pool.map(function, modules.values()), strict=True))


def _use_one_thread() -> None:
    torch.set_num_threads(1)  # OpenMP keeps the number of each thread apart
