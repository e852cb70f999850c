"""The fastest way to train is found by few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from fedlora.runs.planning.fastest_way import (
    NO_SLOWER,
    Candidates,
    Race,
    Way,
    fastest,
    in_words,
    round_seconds,
    sizes_of_passes,
)

LAPTOP = Candidates(
    ("float32", "bfloat16"), ((2, 0), (1, 0), (1, 2)), sizes=(1, 2, 3, 5, 10), clients=10
)


class Machine:
    """A machine that takes known times; its clock goes on with every measurement."""

    def __init__(self, seconds: Callable[[Way], float]) -> None:
        self.seconds, self.now = seconds, 0.0
        self.measured = list[Way]()

    def measure(self, way: Way) -> float:
        self.measured.append(way)
        self.now += (2 if way.workers else 1) * way.clients * min(self.seconds(way), 100.0)
        return self.seconds(way)

    def race(self, candidates: Candidates, seconds: float = 1e9) -> dict[Way, float]:
        return Race(candidates, self.measure, seconds, lambda: self.now).run()


def with_matrix_units(way: Way) -> float:
    """bfloat16 is three times as fast, and larger passes pay in it."""
    base = {"float32": 3.0, "bfloat16": 1.0}[way.dtype]
    gain = 0.9 ** min(way.clients - 1, 4) if way.dtype == "bfloat16" else 1.0
    return base * gain * {2: 0.6, 1: 1.0}[way.threads]


def without_bfloat16(way: Way) -> float:
    """A processor that takes a hundred times as long in bfloat16."""
    return {"float32": 1.0, "bfloat16": 100.0}[way.dtype] * {2: 0.9, 1: 1.0}[way.threads]


def beside_a_busy_process(way: Way) -> float:
    """Threads wait for each other; processes of one thread lose a share."""
    return 20.0 if way.threads == 2 else 1.6 if way.workers else 1.1


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        (with_matrix_units, Way("bfloat16", 1, 2, 5)),
        (without_bfloat16, Way("float32", 1, 2, 1)),
        (beside_a_busy_process, Way("float32", 1, 2, 1)),
    ],
)
def test_what_is_chosen_is_within_a_tenth_of_the_best(
    seconds: Callable[[Way], float], chosen: Way
) -> None:
    way = fastest(Machine(seconds).race(LAPTOP))
    assert way == chosen
    every = [
        round_seconds(x, seconds(x), LAPTOP.clients)
        for dtype in LAPTOP.dtypes
        for threads, workers in LAPTOP.places
        for size in LAPTOP.sizes
        for x in [Way(dtype, threads, workers, size)]
    ]
    assert round_seconds(way, seconds(way), LAPTOP.clients) <= 1.1 * min(every)


def test_a_dtype_that_is_far_slower_is_tried_once() -> None:
    machine = Machine(without_bfloat16)
    machine.race(LAPTOP)
    assert [way.dtype for way in machine.measured].count("bfloat16") == 1


def test_no_more_time_is_taken_than_there_is() -> None:
    machine = Machine(with_matrix_units)
    times = machine.race(LAPTOP, seconds=12.0)
    assert machine.now <= 12.0 + 3.0  # what has not been measured may take longer than expected
    assert 2 <= len(times) < LAPTOP.number
    assert len(Machine(with_matrix_units).race(LAPTOP, seconds=0.0)) == 1


def test_the_median_decides_between_close_ways() -> None:
    """One measurement of the slower way was lucky."""
    values = {2: [1.0, 1.0, 1.0], 1: [0.95, 1.2, 1.2]}
    two = Candidates(("float32",), ((2, 0), (1, 0)), sizes=(1,), clients=1)
    assert fastest(Race(two, lambda way: values[way.threads].pop(0), 1e9).run()).threads == 2


def test_a_way_that_fails_is_none() -> None:
    times = Machine(lambda way: math.inf if way.workers else 1.0).race(LAPTOP)
    assert not any(way.workers for way in times)
    assert Machine(lambda way: math.inf).race(LAPTOP) == {}


def test_worker_processes_where_they_are_no_slower() -> None:
    threads, pool = Way("float32", 2, 0, 5), Way("float32", 1, 2, 5)
    assert fastest({threads: 1.0, pool: NO_SLOWER}) == pool
    assert fastest({threads: 1.0, pool: NO_SLOWER + 0.01}) == threads


def test_float32_where_bfloat16_brings_nothing() -> None:
    exact, rounded = Way("float32", 1, 0, 1), Way("bfloat16", 1, 0, 1)
    assert fastest({exact: 1.0, rounded: 0.97}) == exact
    assert fastest({exact: 1.0, rounded: 0.9}) == rounded


def test_a_round_ends_with_the_busiest_worker() -> None:
    assert round_seconds(Way("float32", 2, 0, 3), 2.0, 10) == 20.0
    assert round_seconds(Way("float32", 1, 2, 5), 2.0, 10) == 10.0
    assert round_seconds(Way("float32", 1, 2, 3), 2.0, 10) == 12.0  # 3 + 3 beside 3 + 1
    assert round_seconds(Way("float32", 1, 2, 10), 2.0, 10) == 20.0


@pytest.mark.parametrize(
    ("clients", "most", "sizes"),
    [(10, 99, (1, 2, 3, 5, 10)), (10, 7, (1, 2, 3, 5, 7)), (1, 5, (1,)), (100, 2, (1, 2))],
)
def test_sizes_of_passes(clients: int, most: int, sizes: tuple[int, ...]) -> None:
    assert sizes_of_passes(clients, most) == sizes


def test_the_choice_in_words() -> None:
    pool, threads = Way("float32", 1, 2, 5), Way("float32", 2, 0, 10)
    single = Way("float32", 1, 2, 1)
    assert in_words(pool, {pool: 2.0, threads: 3.0, single: 2.5}) == (
        "2 processes of 1 thread, 5 clients in a pass, float32 (against it 1.25 x 2 processes of "
        "1 thread, 1 client in a pass, float32; 1.50 x 2 threads, 10 clients in a pass, float32)"
    )
    assert in_words(threads, {threads: 1.0}) == "2 threads, 10 clients in a pass, float32"
