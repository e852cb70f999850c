"""Which rows share a pass."""

from __future__ import annotations

from typing import Any

from fedlora.model.plans import PassKind, consecutive_passes, plan_passes


def row(length: int) -> Any:
    return {"input_ids": [0] * length}


def lengths(rows: Any) -> list[int]:
    return [len(x["input_ids"]) for x in rows]


def together(length: int) -> PassKind:
    return PassKind(False, 0)


def long_alone(length: int) -> PassKind:
    """Rows of more than ten tokens go through the model's own pass."""
    return PassKind(True, length) if length > 10 else PassKind(False, 0)


def test_all_rows_share_a_pass_where_they_fit() -> None:
    (one,) = plan_passes([[row(3), row(4)], [row(5)]], together, 100)
    assert {k: lengths(x) for k, x in one.rows.items()} == {0: [3, 4], 1: [5]}
    assert one.numbers == {0: 0, 1: 0}
    assert one.tokens == 12
    assert not one.padded


def test_no_pass_is_longer_than_allowed_but_for_a_single_row() -> None:
    passes = plan_passes([[row(6), row(6)], [row(3)], [row(20)]], together, 10)
    assert [x.tokens for x in passes] == [9, 6, 20]
    assert [x.numbers for x in passes] == [{0: 0, 1: 0}, {0: 1}, {2: 0}]


def test_how_a_clients_rows_are_divided_does_not_depend_on_the_others() -> None:
    mine = [row(4), row(5), row(6), row(3)]

    def own(passes: Any, client: int) -> dict[int, list[int]]:
        return {x.numbers[client]: lengths(x.rows[client]) for x in passes if client in x.rows}

    alone = own(plan_passes([mine], together, 10), 0)
    beside = own(plan_passes([[row(7)], mine, [row(2), row(9)]], together, 10), 1)
    assert beside == alone


def test_rows_that_are_run_otherwise_do_not_mix() -> None:
    passes = plan_passes([[row(3), row(20)], [row(20)]], long_alone, 100)
    assert [(x.padded, {k: lengths(v) for k, v in x.rows.items()}) for x in passes] == [
        (False, {0: [3]}),
        (True, {0: [20], 1: [20]}),
    ]


def test_runs_keep_the_order_and_every_row() -> None:
    rows = [row(n) for n in (3, 4, 20, 20, 5, 30, 6)]
    cut = [(padded, lengths(part)) for padded, part in consecutive_passes(rows, long_alone, 100)]
    assert cut == [(False, [3, 4]), (True, [20, 20]), (False, [5]), (True, [30]), (False, [6])]
    assert [lengths(x) for _, x in consecutive_passes([row(6), row(6), row(3)], together, 10)] == [
        [6],
        [6, 3],
    ]
    assert list(consecutive_passes([], together, 10)) == []
