"""Finds the fastest way to train: dtype, threads, worker processes, clients in a pass.

What takes how long is told by a function that is handed in. Few ways are measured, and those that
are far slower than the fastest are not measured again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from statistics import median

FAR = 1.5
"""A dtype that takes so many times as long as the fastest is dropped after its first step."""
NEAR = 1.3
"""Ways that take at most so many times as long as the fastest are tried with more clients."""
CLOSE = 1.15
"""Between ways at most so far apart, the median of several measurements decides."""
TURNS = 3
"""Measurements of ways that are close to each other."""
NO_SLOWER = 1.05
"""Worker processes are taken where they take at most so many times as long as the fastest way: one
thread each loses only its share when another program keeps a core busy, while the threads of one
process hold each other up."""


@dataclass(frozen=True, order=True)
class Way:
    """How the clients of a round are trained.

    Args:
        dtype: of the frozen base.
        threads: of each process.
        workers: processes that train; 0: the run's own does.
        clients: in a pass.
    """

    dtype: str
    threads: int
    workers: int
    clients: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        places = f"{self.workers} processes of 1 thread" if self.workers > 1 else threads
        if self.workers == 1:
            places = "1 worker process"
        return f"{places}, {self.clients} client{'s' * (self.clients > 1)} in a pass, {self.dtype}"


@dataclass(frozen=True)
class Candidates:
    """What may be chosen; what is configured has one candidate.

    Args:
        dtypes: of the frozen base.
        places: `(threads of a process, worker processes)`.
        sizes: clients in a pass.
        clients: of a round.
    """

    dtypes: tuple[str, ...]
    places: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    clients: int

    @property
    def number(self) -> int:
        """How many ways there are."""
        return len(self.dtypes) * len(self.places) * len(self.sizes)


Measure = Callable[[Way], float]
"""Seconds of one client's step, trained so; infinite where it cannot be."""


def sizes_of_passes(clients: int, most: int) -> tuple[int, ...]:
    """Numbers of clients in a pass that divide a round into about equal passes: 10 -> 1 2 3 5 10.

    Args:
        clients: that one process trains in a round.
        most: in a pass.
    """
    halves = {math.ceil(clients / 2**k) for k in range(clients.bit_length() + 1)}
    # Where memory allows no half of the round, as many as it allows may be the best.
    return tuple(sorted({x for x in halves if x <= most} | {min(clients, most)}))


def round_seconds(way: Way, seconds: float, clients: int) -> float:
    """Seconds of a step of all clients of a round.

    Args:
        way: to train.
        seconds: of one client's step, trained so.
        clients: of the round.
    """
    busiest = [0] * max(1, way.workers)
    for begin in range(0, clients, way.clients):
        first_free = busiest.index(min(busiest))
        busiest[first_free] += min(way.clients, clients - begin)
    return seconds * max(busiest)


@dataclass
class Race:
    """Measures ways within a time, and keeps what they took.

    Args:
        candidates: what may be chosen.
        measure: of a way.
        seconds: that all measurements may take; one is made in any case.
        clock: seconds of now.
    """

    candidates: Candidates
    measure: Measure
    seconds: float
    clock: Callable[[], float] = time.perf_counter
    found: dict[Way, list[float]] = field(default_factory=dict)

    def run(self) -> dict[Way, float]:
        """Seconds of a step of all clients, for each way that was measured."""
        self._until = self.clock() + self.seconds
        self._one_size()
        self._more_clients()
        self._repeat()
        return self.times()

    def times(self) -> dict[Way, float]:
        """Seconds of a step of all clients, by way: the median of what was measured.

        Ways in which a step could not be taken are left out.
        """
        number = self.candidates.clients
        medians = {way: median(seconds) for way, seconds in self.found.items()}
        return {
            way: round_seconds(way, seconds, number)
            for way, seconds in medians.items()
            if math.isfinite(seconds)
        }

    def _one_size(self) -> None:
        """All places and dtypes with the smallest pass; dtypes that are far slower in one alone."""
        size, dtypes = self.candidates.sizes[0], self.candidates.dtypes
        for threads, workers in self.candidates.places:
            ways = [Way(dtype, threads, workers, size) for dtype in dtypes]
            for way in ways:
                self._try(way)
            taken = {way.dtype: median(self.found[way]) for way in ways if way in self.found}
            dtypes = tuple(x for x in taken if taken[x] <= FAR * min(taken.values())) or dtypes

    def _more_clients(self) -> None:
        """Larger passes of the ways that are near the fastest: of each the largest, then others.

        The largest is what a run takes that measures nothing, so it is to be known first.
        """
        for larger in zip_longest(*map(self._larger, self._within(NEAR))):
            for way in larger:
                if way is not None:
                    self._try(way)

    def _larger(self, way: Way) -> list[Way]:
        """A way with more clients in a pass, as many as leave no worker process without any."""
        share = math.ceil(self.candidates.clients / max(1, way.workers))
        sizes = [size for size in self.candidates.sizes if way.clients < size <= share]
        return [replace(way, clients=size) for size in reversed(sizes)]

    def _repeat(self) -> None:
        """The ways that are close to the fastest, in turns, for the median to decide."""
        for _ in range(TURNS - 1):
            close = self._within(CLOSE)
            for way in close if len(close) > 1 else []:
                self._try(way)

    def _within(self, factor: float) -> list[Way]:
        """The ways at most so many times as slow as the fastest, fastest first."""
        times = self.times()
        most = factor * min(times.values(), default=0)
        return sorted((way for way in times if times[way] <= most), key=lambda way: times[way])

    def _try(self, way: Way) -> bool:
        """Measure a way unless there is too little time left; whether it was measured."""
        if self.found and self.clock() + self._expected(way) > self._until:
            return False
        self.found.setdefault(way, []).append(self.measure(way))
        return True

    def _expected(self, way: Way) -> float:
        """Seconds that a measurement will take; processes begin with a step to warm up."""
        alike = [x for x in self.found if (x.dtype, x.threads) == (way.dtype, way.threads)]
        known = [median(self.found[x]) for x in alike or self.found]
        return (2 if way.workers else 1) * way.clients * min(known)


def fastest(times: Mapping[Way, float]) -> Way:
    """The way to take: the fastest, or float32 and worker processes where they are no slower.

    Args:
        times: seconds of a step of all clients, by way.
    """
    most = NO_SLOWER * min(times.values())
    good = [way for way in times if times[way] <= most]
    return min(good, key=lambda way: (way.dtype != "float32", way.workers < 2, times[way]))


def in_words(chosen: Way, times: Mapping[Way, float]) -> str:
    """The choice, and how many times as long the best of every other kind takes.

    Args:
        chosen: of the ways.
        times: seconds of a step of all clients, by way.
    """
    others: dict[object, Way] = {}
    for way in sorted(times, key=lambda way: times[way]):
        kind = way.dtype, way.threads, way.workers
        if kind != (chosen.dtype, chosen.threads, chosen.workers):
            others.setdefault(kind, way)
    same = [way for way in times if replace(way, clients=chosen.clients) == chosen]
    least = min(same, key=lambda way: way.clients)
    slower = [least] if least != chosen else []
    each = [f"{times[way] / times[chosen]:.2f} x {way}" for way in [*slower, *others.values()]]
    return f"{chosen}" + (f" (against it {'; '.join(each)})" if each else "")
