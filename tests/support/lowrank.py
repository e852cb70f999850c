"""Draws low-rank updates of every form, and compares them with dense float64 matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.lowrank import Delta, Dense, LowRank

law = settings(max_examples=25, deadline=None, derandomize=True)
"""How many examples a law is tried on; the same in every run."""

# Relative to the norms of the factors: what near-cancelling terms lose is not an error.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
sizes = st.integers(1, 8)
# Up to beyond both dimensions, and none at all.
ranks = st.integers(0, 10)
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64])
# alpha / r and alpha / sqrt(r) of ordinary configurations, small and large.
scales = st.sampled_from([1e-3, 0.25, 1.0, 2.0, 64.0])


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def groups(
    draw: st.DrawFn, least: int = 1, most: int = 4, forms: st.SearchStrategy[bool] | None = None
) -> list[Delta]:
    """Updates of one shape and dtype, as factors or dense, of any rank and scale."""
    m, n, dtype = draw(sizes), draw(sizes), draw(dtypes)
    out: list[Delta] = []
    for _ in range(draw(st.integers(least, most))):
        seed, factor = draw(seeds), draw(scales)
        if draw(st.booleans() if forms is None else forms):
            out.append(Dense(random(m, n, seed=seed, dtype=dtype) * factor))
        else:
            rank = draw(ranks)
            both = random(m + n, rank, seed=seed, dtype=dtype)
            out.append(LowRank(both[m:].T, both[:m] * factor))
    return out


updates = groups(1, 1).map(lambda terms: terms[0])


factor_updates = groups(1, 1, st.just(False)).map(lambda terms: terms[0])


def exactly(x: Delta) -> Tensor:
    """The matrix in float64, by none of the functions under test."""
    return x.W.double() if isinstance(x, Dense) else x.B.double() @ x.A.double()


def size(*terms: Delta) -> float:
    """The sum of the terms' norms, factors apart: what tolerances are relative to."""
    return sum(
        float(x.W.double().norm())
        if isinstance(x, Dense)
        else float(x.B.double().norm() * x.A.double().norm())
        for x in terms
    )


def dtype_of(x: Delta) -> torch.dtype:
    return x.W.dtype if isinstance(x, Dense) else x.A.dtype


def assert_close(got: Delta | Tensor, wanted: Tensor, relative_to: float, tolerance: float) -> None:
    matrix = got.double() if isinstance(got, Tensor) else exactly(got)
    assert matrix.shape == wanted.shape
    assert float((matrix - wanted).norm()) <= tolerance * relative_to


def tensors(terms: Sequence[Delta]) -> list[Tensor]:
    return [t for x in terms for t in ([x.W] if isinstance(x, Dense) else [x.A, x.B])]
