"""torch's default generator is lent, and given back as it was."""

from __future__ import annotations

import threading

import torch

from fedlora.model.torch_generator import borrowed_generator


def test_afterwards_it_stands_where_it_stood() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    with borrowed_generator([], seed=5):
        torch.rand(10)
    assert torch.equal(torch.rand(3), wanted)


def test_a_seed_draws_the_same_and_none_goes_on() -> None:
    drawn = []
    for _ in range(2):
        with borrowed_generator([], seed=5):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    torch.manual_seed(1)
    with borrowed_generator([]):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), inside)


def test_one_borrower_at_a_time_who_may_borrow_again() -> None:
    entered = threading.Event()

    def other() -> None:
        with borrowed_generator([]):
            entered.set()

    thread = threading.Thread(target=other)
    with borrowed_generator([]), borrowed_generator([]):
        thread.start()
        assert not entered.wait(0.05)
    thread.join()
    assert entered.is_set()
