"""Combines what sites have measured of the global model on rows of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedlora.federation.handshake import Evaluated

_BY_LABELS = ("loss", "token_accuracy")  # means over labelled tokens, or over a classifier's rows


def mean_by_rows(evaluated: Mapping[int, Evaluated]) -> dict[str, Any]:
    """One evaluation of what all sites have measured, as if their rows lay together.

    `loss` and `token_accuracy` are weighted by what they are means over (labelled tokens, or rows
    of a classifier), and so are those of all rows; `perplexity` is `exp(loss)` of that. All other
    numbers are means weighted by rows. That is exact for `accuracy`, and for `exact_match`, which
    counts turns, where every row has as many; of `macro_f1` it is a mean of the sites' own. What is
    no number, or no site has a finite value of, is left out.

    Args:
        evaluated: client number -> what it has measured.
    """
    sites = [evaluated[client] for client in sorted(evaluated) if evaluated[client].rows]
    names = list(dict.fromkeys(name for site in sites for name in site.metrics))
    out: dict[str, Any] = {}
    for name in names:
        weighted = [
            (site.labels if name in _BY_LABELS else site.rows, site.metrics[name])
            for site in sites
            if _is_number(site.metrics.get(name))
        ]
        total = sum(weight for weight, _ in weighted)
        if total:
            out[name] = sum(weight * value for weight, value in weighted) / total
    if "perplexity" in out and "loss" in out:
        out["perplexity"] = math.exp(min(out["loss"], 700.0))
    return out


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
