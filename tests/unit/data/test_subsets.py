"""Which rows are taken where fewer than all may be: drawn by the seed, never the first ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fedlora.data.subsets import draw_subsets, drawn, in_turn
from fedlora.seeds import Purpose


def config(train: dict[int, int | None] | int | None, evaluation: int | None) -> Any:
    def of_client(client: int) -> Any:
        limit = train.get(client) if isinstance(train, dict) else train
        return SimpleNamespace(max_train_samples=limit)

    return SimpleNamespace(seed=1, max_eval_samples=evaluation, of_client=of_client)


def test_all_rows_where_there_are_no_more_than_allowed() -> None:
    for limit in (None, 5, 9):
        assert drawn(5, limit, 0, 0, Purpose.TRAIN_ROWS) == [0, 1, 2, 3, 4]


def test_rows_are_drawn_in_ascending_order_without_repetition() -> None:
    chosen = drawn(1000, 20, 0, 0, Purpose.TRAIN_ROWS)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 20
    assert chosen[-1] > 100  # not the first rows of a file that may be sorted
    assert chosen == drawn(1000, 20, 0, 0, Purpose.TRAIN_ROWS)
    assert chosen != drawn(1000, 20, 0, 1, Purpose.TRAIN_ROWS)
    assert chosen != drawn(1000, 20, 0, 0, Purpose.EVAL_ROWS)


def test_every_client_has_its_own_limit_and_it_is_said() -> None:
    made = draw_subsets(config({0: 3, 1: None}, 4), [10, 5], 1000)
    assert [len(rows) for rows in made.clients] == [3, 5]
    assert len(made.eval) == 4
    assert made.in_words == (
        "8 of 15 rows are trained on (max_train_samples)",
        "4 of 1,000 rows are evaluated on (max_eval_samples)",
    )


def test_nothing_is_said_where_all_are_taken() -> None:
    made = draw_subsets(config(None, None), [2, 1], 3)
    assert (made.clients, made.eval, made.in_words) == ([[0, 1], [0]], [0, 1, 2], ())


def test_held_out_rows_are_taken_of_one_client_after_the_other() -> None:
    parts = [["a0", "a1", "a2"], ["b0"], ["c0", "c1"]]
    everything, said = in_turn(parts, None, 0)
    assert (everything, said) == (["a0", "b0", "c0", "a1", "c1", "a2"], ())
    some, said = in_turn(parts, 4, 0)
    assert [row[0] for row in some] == ["a", "b", "c", "a"]
    assert said == ("4 of 6 rows are evaluated on (max_eval_samples)",)
