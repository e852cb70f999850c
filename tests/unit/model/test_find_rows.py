"""Where the clients' rows lie in what a module gets, found by running a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fedlora.data.tokenize import Tokens
from fedlora.model.client_rows import ClientRows, RowLayout
from fedlora.model.find_rows import find_rows
from fedlora.model.full_modules import FullModule

WIDTH = 6
TABLE = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(0))


def draw(lengths: Sequence[int], seed: int) -> list[Tokens]:
    """Random rows."""
    source = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(60, (n,), generator=source).tolist()} for n in lengths]


def passed(module: nn.Module, arrange: Callable[[Tensor, list[int]], Tensor], rows: object) -> None:
    """A pass in which a module gets the embedded tokens in some arrangement."""
    lengths = [len(row["input_ids"]) for row in rows]  # type: ignore[attr-defined]
    ids = torch.tensor([i for row in rows for i in row["input_ids"]])  # type: ignore[attr-defined]
    module(arrange(TABLE[ids], lengths))


def form_of(arrange: Callable[[Tensor, list[int]], Tensor]) -> tuple[bool, dict[int, RowLayout]]:
    """What is found out of a module that gets this."""
    module = nn.Identity()
    known, forms = find_rows(draw, [], [module], partial(passed, module, arrange))
    return known, forms[module]


def test_tokens_along_one_axis() -> None:
    assert form_of(lambda x, _: x[None]) == (True, {3: RowLayout(1)})
    assert form_of(lambda x, _: x) == (True, {2: RowLayout(0)})
    heads = form_of(lambda x, _: x.view(1, -1, 2, 3).transpose(1, 2))
    assert heads == (True, {4: RowLayout(2)})


def test_samples_instead_of_tokens() -> None:
    def pooled(x: Tensor, lengths: list[int]) -> Tensor:
        return torch.stack([part.mean(0) for part in x.split(lengths)])

    assert form_of(pooled) == (True, {2: RowLayout(0, "samples")})


def test_several_entries_of_each_token_together_or_apart() -> None:
    together = form_of(lambda x, _: x.view(-1, 3))  # token 0's two halves, token 1's ...
    assert together == (True, {2: RowLayout(0, multiples=frozenset({2}))})
    apart = form_of(lambda x, _: torch.cat([x[:, :3], x[:, 3:]]))  # all first halves, then ...
    assert apart == (True, {2: RowLayout(0, multiples=frozenset({2}), strided=True)})


def test_rows_that_are_mixed_are_not_known() -> None:
    assert form_of(lambda x, _: x.cumsum(0)) == (False, {})
    assert form_of(lambda x, _: x[torch.arange(len(x) - 1, -1, -1)]) == (False, {})


def test_a_module_that_never_runs_is_no_obstacle() -> None:
    idle, busy = nn.Identity(), nn.Identity()
    known, forms = find_rows(draw, [], [idle, busy], partial(passed, busy, lambda x, _: x))
    assert known
    assert forms[idle] == {}


def test_a_module_trained_whole_learns_where_its_rows_lie() -> None:
    head = nn.Linear(WIDTH, 2)
    full = FullModule(head, ClientRows())
    known, _ = find_rows(draw, [full], [], partial(passed, head, lambda x, _: x[None]))
    assert known
    assert full.inputs == {(3,): (RowLayout(1),)}
    assert full.outputs == {(3,): (RowLayout(1),)}
    assert full.watch is None
