"""What one thread's `one_thread` remembers is not what another's does."""

from __future__ import annotations

import threading

import pytest

from fedlora import threads


def test_how_many_threads_there_were_outside_is_each_threads_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = threading.local()  # as OpenMP keeps them
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: getattr(counts, "number", 2))
    monkeypatch.setattr(
        threads.torch, "set_num_threads", lambda number: setattr(counts, "number", number)
    )
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        counts.number = 7
        with threads.one_thread():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    pools = list[int]()
    real = threads.ThreadPoolExecutor

    def pool(number: int, **others: object) -> object:
        pools.append(number)
        return real(number, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(threads, "ThreadPoolExecutor", pool)
    with threads.one_thread():
        assert threads.map_modules(str, {str(i): i for i in range(9)})["3"] == "3"
    leave.set()
    thread.join()
    assert pools == [2]
