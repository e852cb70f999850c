"""How adapters overlap, against whole matrices in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.linalg import subspace_angles

from fedlora import InputError
from fedlora.adapters.overlap import overlap
from fedlora.lowrank import LowRank
from support.dense_merges import whole
from support.merging import made

PARTS = [
    made({"a": ((11, 7), 4), "b": ((6, 13), 2)}, 1),
    made({"a": ((11, 7), 2)}, 2),
    made({"a": ((11, 7), 3), "b": ((6, 13), 1)}, 3),
]


def test_it_is_that_of_the_whole_matrices() -> None:
    found = overlap(PARTS)
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    updates = {name: whole(PARTS, name) for name in ("a", "b")}
    for name, layer in found.layers.items():
        dense = updates[name]
        for k, norm in enumerate(layer.norms):
            assert norm == (
                pytest.approx(float(dense[k].norm())) if name in PARTS[k].deltas else None
            )
        for pair in layer.pairs:
            x, y = dense[pair.first], dense[pair.second]
            if not (x.any() and y.any()):
                assert pair.cosine is None
                continue
            assert pair.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())))
            for share, one, other in ((pair.shared[0], x, y), (pair.shared[1], y, x)):
                pinv = torch.linalg.pinv(other, rtol=1e-5)
                within = other @ pinv @ one @ pinv @ other
                assert share == pytest.approx(float((within.norm() / one.norm()) ** 2))
            p = torch.linalg.matrix_rank(x, rtol=1e-5), torch.linalg.matrix_rank(y, rtol=1e-5)
            u = [torch.linalg.svd(z) for z in (x, y)]
            out = subspace_angles(u[0].U[:, : p[0]].numpy(), u[1].U[:, : p[1]].numpy())
            inside = subspace_angles(u[0].Vh[: p[0]].T.numpy(), u[1].Vh[: p[1]].T.numpy())
            for angles, wanted in ((pair.angles_out, out), (pair.angles_in, inside)):
                assert sorted(map(math.degrees, wanted)) == pytest.approx(angles, abs=1e-4)


def test_over_all_modules_numbers_are_those_of_one_block_matrix() -> None:
    found = overlap(PARTS)
    for k, norm in enumerate(found.norms):
        squares = [float(whole(PARTS, n)[k].norm()) ** 2 for n in ("a", "b")]
        assert norm == pytest.approx(math.sqrt(sum(squares)))
    a, b = whole(PARTS, "a"), whole(PARTS, "b")
    inner = float((a[0] * a[2]).sum() + (b[0] * b[2]).sum())
    assert found.pairs[1].cosine == pytest.approx(inner / (found.norms[0] * found.norms[2]))


def test_an_adapter_and_its_opposite_share_everything() -> None:
    one = PARTS[0]
    other = replace(one, deltas={n: LowRank(x.A, -2 * x.B) for n, x in one.deltas.items()})
    (pair,) = overlap([one, other]).pairs
    assert pair.cosine == pytest.approx(-1.0)
    assert pair.shared == pytest.approx((1.0, 1.0))
    assert pair.angles_out[0] < 1e-4
    assert pair.angles_in[0] < 1e-4


def test_one_adapter_overlaps_with_nobody() -> None:
    with pytest.raises(InputError, match="at least two"):
        overlap(PARTS[:1])
