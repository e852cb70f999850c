"""Adapters become one by every rule; those that PEFT saved are in tests/runs/test_aggregate.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedlora import InputError, load_adapter
from fedlora.adapters.aggregate import aggregate, save_adapter
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.lowrank import LowRank, to_dense
from fedlora.methods import METHODS, ONE_SHOT
from fedlora.methods.merges import MERGES
from support.merging import (
    effect,
    made,
    same_effect,
    true_error,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def mixed() -> list[SavedAdapter]:
    """Three adapters of different ranks in every module, rank 0 too; one lacks a module."""
    x, y = (11, 7), (6, 13)
    return [
        made({"a": (x, 4), "b": (y, 2)}, 1),
        made({"a": (x, 2), "b": (y, 0)}, 2),
        made({"a": (x, 6)}, 3),
    ]


def alike() -> list[SavedAdapter]:
    """Three adapters of one rank."""
    return [made({"a": ((11, 7), 4), "b": ((6, 13), 4)}, i) for i in (1, 2, 3)]


def test_a_module_that_is_missing_counts_as_zero_with_its_full_weight() -> None:
    parts = mixed()
    found = aggregate(parts, [0.5, 0.3, 0.2])
    assert found.weights == pytest.approx((0.5, 0.3, 0.2))
    torch.testing.assert_close(
        effect(found)["b"], 0.5 * effect(parts[0])["b"], rtol=1e-5, atol=1e-6
    )
    assert found.layers["b"].ranks == (2, 0, None)
    assert found.layers["a"].ranks == (4, 2, 6)
    assert found.layers["b"].error < 1e-6


@pytest.mark.parametrize("method", ONE_SHOT)
def test_an_adapter_of_weight_zero_does_not_count(method: str) -> None:
    """Nor does what it alone has: a module, a saved head."""
    one = made({"a": ((5, 4), 2)}, 1)
    other = made({"a": ((5, 4), 2), "b": ((5, 4), 2)}, 2)
    if not METHODS[method].mixed_ranks:
        del other.deltas["b"]
    other.dense["score.weight"] = torch.ones(2, 4)
    exact = {"energy_threshold": 1.0} if method == "florist" else {}
    exact |= {"correction_penalty": 0.0} if method == "lora_fair" else {}
    found = aggregate([one, other], [1, 0], method=method, **exact)
    torch.testing.assert_close(effect(found)["a"], effect(one)["a"], rtol=1e-4, atol=1e-5)
    assert "b" not in found.deltas or not to_dense(found.deltas["b"]).any()
    assert "score.weight" not in found.dense or found.dense["score.weight"].any()


def test_adapters_that_cancel_are_a_zero_update(tmp_path: Path) -> None:
    """One and its opposite: whatever the rounding, it is written and read back."""
    one = made({"a": ((40, 30), 3), "b": ((20, 30), 2)}, 1)
    other = SavedAdapter({n: LowRank(x.A, -x.B) for n, x in one.deltas.items()}, {}, one.config)
    for method in ("exact", "flora", "florist", "flexlora"):
        found = aggregate([one, other], method=method)
        assert max(float(x.abs().max()) for x in effect(found).values()) < 1e-5
        save_adapter(tmp_path / method, found)
        assert all(layer.error < 1e-3 for layer in found.layers.values()), method


W = (0.5, 0.3, 0.2)


def dense_rule(method: str, parts: Sequence[SavedAdapter], name: str, **options: float) -> Tensor:
    """The rule's formula for one module, dense in float64, zeros where an adapter lacks it."""
    shape = next(a.deltas[name].shape for a in parts if name in a.deltas)
    zero = LowRank(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0))
    having = [a.deltas.get(name, zero) for a in parts]
    wide = max(x.rank for x in having)

    def padded(x: LowRank) -> tuple[Tensor, Tensor]:
        a, b = torch.zeros(wide, shape[1]).double(), torch.zeros(shape[0], wide).double()
        a[: x.rank], b[:, : x.rank] = x.A.double(), x.B.double()
        return a, b

    def mean(shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        factors = [padded(x) for x in having]
        a = sum(p * a for p, (a, _) in zip(shares, factors, strict=True))
        b = sum(p * b for p, (_, b) in zip(shares, factors, strict=True))
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        return a, b

    total = torch.zeros(shape).double()
    for p, x in zip(W, having, strict=True):
        total += p * (x.B.double() @ x.A.double())
    if method in ("fedit", "zero_pad"):
        a, b = mean(W)
        return b @ a
    if method == "hetlora":
        sizes = [
            p * float((x.B.double() @ x.A.double()).norm()) for p, x in zip(W, having, strict=True)
        ]
        a, b = mean([s / sum(sizes) for s in sizes])
        return b @ a
    if method == "lora_fair":
        a, b = mean(W)
        gram = a @ a.T + options.get("correction_penalty", 0.01) * torch.eye(wide).double()
        return (b + (total - b @ a) @ a.T @ torch.linalg.inv(gram)) @ a
    if method == "florist":
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        share = values.square().cumsum(0) / values.square().sum()
        keep = int((share < options.get("energy_threshold", 0.9)).sum()) + 1
        return left[:, :keep] * values[:keep] @ right[:keep]
    if method == "raflora":  # every direction over those that have it
        out = torch.zeros(shape).double()
        for i in range(wide):
            over = sum(p for p, x in zip(W, having, strict=True) if x.rank > i)
            for p, x in zip(W, having, strict=True):
                if x.rank > i:
                    out += p / over * torch.outer(x.B[:, i].double(), x.A[i].double())
        return out
    if method == "flora" and "scaling_factor" in options:
        return options["scaling_factor"] * sum(
            (x.B.double() @ x.A.double() for x in having), torch.zeros(shape).double()
        )
    assert method in ("exact", "flora", "flexlora", "fedex", "fedmomentum")
    return total


@pytest.mark.parametrize("kind", ["mixed", "alike"])
@pytest.mark.parametrize("method", ONE_SHOT)
def test_every_rule_is_its_formula(method: str, kind: str, tmp_path: Path) -> None:
    parts = mixed() if kind == "mixed" else alike()
    if kind == "mixed" and not METHODS[method].mixed_ranks:
        with pytest.raises(InputError, match=rf"{method} needs one rank .*a has 4 2 6; use exact"):
            aggregate(parts, W, method=method)
        return
    found = aggregate(parts, W, method=method)
    wanted = {name: dense_rule(method, parts, name) for name in ("a", "b")}
    same_effect(effect(found), wanted, 2e-5)
    # The error is that against the weighted sum, whatever the rule makes of it.
    exact = {name: dense_rule("exact", parts, name) for name in ("a", "b")}
    for name, error in true_error(wanted, exact).items():
        assert found.layers[name].error == pytest.approx(error, rel=1e-4, abs=2e-6)
    save_adapter(tmp_path / "out", found)
    same_effect(effect(load_adapter(tmp_path / "out")), wanted, 2e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("florist", {"energy_threshold": 0.5}),
        ("florist", {"energy_threshold": 1.0}),
        ("lora_fair", {"correction_penalty": 3.0}),
        ("lora_fair", {"correction_penalty": 0.0}),
        ("flora", {"scaling_factor": 0.25}),
    ],
)
def test_options_of_a_rule(method: str, options: dict[str, float]) -> None:
    parts = alike()
    found = aggregate(parts, W, method=method, **options)
    wanted = {name: dense_rule(method, parts, name, **options) for name in ("a", "b")}
    same_effect(effect(found), wanted, 2e-5)


def test_a_rule_and_a_rank_together() -> None:
    parts = mixed()
    found = aggregate(parts, W, method="raflora", rank=2)
    for name in ("a", "b"):
        left, values, right = torch.linalg.svd(dense_rule("raflora", parts, name))
        best = left[:, :2] * values[:2] @ right[:2]
        torch.testing.assert_close(effect(found)[name], best, rtol=1e-4, atol=1e-5)
        exact = dense_rule("exact", parts, name)
        error = float((best - exact).norm() / exact.norm())
        assert found.layers[name].error == pytest.approx(error, rel=1e-4)


def test_which_rules_there_are() -> None:
    assert set(METHODS) - set(ONE_SHOT) == {"ffa", "rolora", "fedsa", "fedsvd"}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("task_type", [None, "CAUSAL_LM", "SEQ_CLS"]),
        ("task_type", ["SEQ_CLS", None, "CAUSAL_LM"]),
    ],
)
def test_every_two_of_many_have_to_agree(key: str, values: list[str | None]) -> None:
    """One that says nothing does not hide that others differ."""
    parts = [made({"a": ((5, 4), 2)}, i, **{key: v}) for i, v in enumerate(values)]
    assert aggregate(parts[:2]).config[key] == (values[0] or values[1])
    with pytest.raises(InputError, match=key):
        aggregate(parts)


class Sizes(TorchDispatchMode):
    """The largest tensor any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("method", [*ONE_SHOT, *MERGES])
def test_no_operation_makes_the_whole_matrix(method: str, tmp_path: Path) -> None:
    """Of 8192 x 8192, 256 MiB: the factors of both have a 700th of that."""
    ranks = (4, 8) if method in MERGES or METHODS[method].mixed_ranks else (6, 6)
    size = 8192
    parts = [made({"a": ((size, size), r)}, r) for r in ranks]
    for i, x in enumerate(parts):
        save_adapter(tmp_path / f"{i}", x)
    for i, cut in enumerate(({}, {"rank": 3}, {"energy": 0.5})):
        with Sizes() as seen:
            found = aggregate([load_adapter(tmp_path / p) for p in "01"], method=method, **cut)
            save_adapter(tmp_path / f"out{i}", found)
        # Everything stacked a few times over, in float64.
        assert size * 4 * 4 <= seen.largest <= size * 8 * sum(ranks) * 8 < size * size * 4 / 40
