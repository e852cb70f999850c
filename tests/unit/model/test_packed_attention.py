"""Attention over samples side by side: what transformers hands to it, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.model.client_rows import ClientRows
from fedlora.model.packed_attention import (
    PackingError,
    attending,
    noting_windows,
    packed_attention,
    running_samples,
    sample_mask,
)
from fedlora.model.sample_groups import samples_of

LENGTHS = (5, 3)
SAMPLES = samples_of(LENGTHS, [0, 1])


def heads(number: int, seed: int) -> Tensor:
    """`(1, heads, tokens, d)`."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(1, number, sum(LENGTHS), 4, generator=source, dtype=torch.float64)


def attend(mask: Tensor | None = None, rows: ClientRows | None = None, **more: Any) -> Tensor:
    """Four heads of queries, two of keys and values."""
    with attending(SAMPLES, rows or ClientRows()):
        out, _ = packed_attention(nn.Module(), heads(4, 0), heads(2, 1), heads(2, 2), mask, **more)
    return out


def causal(_: Any, __: Any, i: Tensor, j: Tensor) -> Tensor:
    """A token looks at those before it."""
    return j <= i


def test_each_sample_is_what_torch_makes_of_it_alone() -> None:
    q, k, v = heads(4, 0), heads(2, 1), heads(2, 2)
    out, begin = attend(scaling=0.3), 0
    for length in LENGTHS:
        part = slice(begin, begin + length)
        wanted = F.scaled_dot_product_attention(
            q[:, :, part],
            k[:, :, part].repeat_interleave(2, 1),
            v[:, :, part].repeat_interleave(2, 1),
            is_causal=True,
            scale=0.3,
        )
        torch.testing.assert_close(out[:, part], wanted.transpose(1, 2))
        begin += length


def test_a_clients_dropout_does_not_depend_on_who_is_beside_it() -> None:
    rows = ClientRows()
    outs = []
    for seeds in ([1, 2], [3, 2]):
        with rows.seeded(seeds):
            outs.append(attend(rows=rows, dropout=0.5))
    assert not torch.equal(outs[0][:, :5], outs[1][:, :5])
    assert torch.equal(outs[0][:, 5:], outs[1][:, 5:])


def test_a_mask_is_the_models_own_rule_for_a_sample_by_itself() -> None:
    def window(_: Any, __: Any, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < 2)

    with attending(SAMPLES, ClientRows()), noting_windows() as windows:
        assert sample_mask(1, 8, causal) is None
        assert sample_mask(1, 8, lambda *_: torch.tensor(True)) is None
        mask = sample_mask(1, 8, window, local_size=2)
    assert mask is not None
    assert torch.equal(mask[0, 0], torch.ones(5, 5, dtype=torch.bool).tril().triu(-1))
    assert windows == {2}
    assert attend(mask).shape == (1, 8, 4, 4)


def test_a_rule_that_depends_on_the_place_in_the_pass_is_refused() -> None:
    def chunked(_: Any, __: Any, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i // 3 == j // 3)  # the second sample begins within a chunk

    with attending(SAMPLES, ClientRows()):
        with pytest.raises(PackingError, match="depends on a sample's place in the pass"):
            sample_mask(1, 8, chunked, local_size=3)
        with pytest.raises(PackingError, match="a mask over 1 x 9"):
            sample_mask(1, 9, causal)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"softcap": 30.0}, "attention with softcap"),
        ({"s_aux": torch.ones(1)}, "attention with s_aux"),
        ({"sliding_window": 3}, "a window of 3 without a mask"),
        ({"mask": torch.zeros(1, 1, 8, 8)}, "a mask of shape"),
    ],
)
def test_what_is_not_known_here_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(PackingError, match=says):
        attend(**more)


def test_outside_of_a_pass_nothing_runs() -> None:
    with pytest.raises(PackingError, match="no packed pass is running"):
        running_samples()
    with attending(SAMPLES, ClientRows()):
        assert running_samples() is SAMPLES
    with pytest.raises(PackingError, match="attention with no samples"):
        packed_attention(nn.Module(), heads(1, 0), heads(1, 1), heads(1, 2), None)
