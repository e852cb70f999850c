"""Carries along the weights of the base that lie in adapters, if they are equal in all of these."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedlora.adapters.contents import same_weights
from fedlora.adapters.labels import whose
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError


def common_base_weights(
    adapters: Sequence[SavedAdapter],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Collect the weights of the base that lie in some of the adapters.

    Returns:
        Name in the base -> the weight, of the widest dtype it has in an adapter; and notes on those
        that not all adapters have.

    Raises:
        InputError: a weight differs between adapters, so that their bases do.
    """
    weights: dict[str, Tensor] = {}
    notes = []
    for name in dict.fromkeys(name for a in adapters for name in a.base):
        having = [a for a in adapters if name in a.base]
        first = having[0]
        for other in having[1:]:
            if not same_weights(first.base[name], other.base[name]):
                raise InputError(_differs(name, first, other))
        weights[name] = max((a.base[name] for a in having), key=lambda t: t.element_size())
        if len(having) < len(adapters):
            notes.append(f"{name}, a weight of the base, is that of {whose(first.source)}")
    for name in dict.fromkeys(name for a in adapters for name in a.fingerprints):
        digests = {a.fingerprints[name] for a in adapters if a.fingerprints.get(name)}
        # A fingerprint says "dtype shape digest". Two digests for the same dtype and shape are of
        # two bases; a weight of another dtype cannot be compared.
        if len({text.rpartition(" ")[0] for text in digests}) < len(digests):
            raise InputError(
                f"{name}: these adapters repeat weights of their base, and they differ; adapters "
                "of different bases cannot be combined"
            )
    return weights, tuple(notes)


def _differs(name: str, one: SavedAdapter, other: SavedAdapter) -> str:
    """How two copies of a weight of the base differ, and what to do."""
    a, b = one.base[name], other.base[name]
    both = f"{whose(one.source)} and {whose(other.source)}"
    if a.shape != b.shape:
        return (
            f"{name}: of the shapes {tuple(a.shape)} and {tuple(b.shape)} in {both}: their "
            "vocabularies were resized to different sizes. Resize it once, save that model, and "
            "train all adapters on it"
        )
    a, b = a.reshape(len(a) if a.ndim else 1, -1), b.reshape(len(b) if b.ndim else 1, -1)
    rows = int((a.double() != b.double()).any(1).sum())
    return (
        f"{name}: {both} repeat this weight of the base, and {rows} of its {len(a)} rows "
        "differ. Rows that a resized vocabulary got are drawn at random by everybody: resize "
        "it once, save that model, and train all adapters on it. If the weight was trained, name "
        "its module in modules_to_save of every adapter_config.json, and it is averaged"
    )
