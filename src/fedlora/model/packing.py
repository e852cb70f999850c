"""Finds out whether a model's samples can lie side by side without padding.

A packed pass is compared with the model's own forward pass of every sample alone. Both are computed
in float64 by the model's own modules (`wide`), so that a difference is an error and not rounding,
whatever the dtype of the base. Whether one sample influences another is decided without a
tolerance: the embeddings of one are made NaN, which spreads to all that depends on them
(`keeps_samples_apart`).

Only short samples are tried, so what may change with length is treated separately. Masks are the
model's own at any length (`packed_attention.sample_mask`). Rotary factors that follow the longest
sample are looked for at far positions (`RotaryFactors`). Any other number of the configuration that
may be a length limits the tokens of a pass (`smallest_unexplained`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.model.config_lengths import UNBOUNDED, positions_of, smallest_unexplained
from fedlora.model.device import device_of
from fedlora.model.packed_attention import noting_windows
from fedlora.model.rotary_factors import RotaryFactors
from fedlora.model.trial_rows import LENGTHS, vocabulary_size
from fedlora.model.wide import (
    BOUNDS,
    computing_in,
    nearly_equal,
    wide_dtype,
)

_LOG = logging.getLogger(__name__)
RunRows = Callable[[Sequence[Tokens]], Tensor]
"""Samples -> the logits of all their labelled tokens, or of all samples, one after the other."""


@dataclass(frozen=True)
class PackingVerdict:
    """How a model is to be run.

    Args:
        packed: samples may lie side by side, their positions counted from `offset`.
        offset: of the first position.
        together: samples of different lengths can be padded to one length.
        longest: a packed pass of at most so many tokens is known to be right.
        longest_padded: padding is known to change nothing for samples of at most so many tokens.
        auxiliary: the model's own loss is `CE + auxiliary aux_loss`.
    """

    packed: bool
    offset: int
    together: bool
    longest: int
    longest_padded: int
    auxiliary: float


def examine(
    model: Any,
    configs: Sequence[Any],
    factors: RotaryFactors,
    rows: Sequence[Tokens],
    run_padded: RunRows,
    packed: Callable[[Sequence[Tokens], int], Tensor] | None,
) -> PackingVerdict:
    """Compare a packed pass, and a padded one, with the model's own pass of each row alone.

    Args:
        model: in evaluation mode, without adapters; nothing of it changes.
        configs: its own and those of its parts.
        factors: of the model, not examined yet.
        rows: as `random_rows` makes them.
        run_padded: the model's own forward pass of padded samples.
        packed: `(rows, offset) -> logits`, a packed pass whose positions begin at `offset`; None:
            the model has no trunk that could be packed.

    Raises:
        InputError: see `auxiliary_share`.
    """
    dtype, classifier = wide_dtype(model), "label" in rows[0]
    with torch.no_grad():
        auxiliary = 0.0 if classifier else auxiliary_share(model, configs, dtype)
        together, offset = False, None
        with noting_windows() as windows:
            # Whatever fails here for some architecture, it can still run rows of equal length.
            try:
                with computing_in(configs, dtype):
                    alone = torch.cat([run_padded([row]) for row in rows])
                    together = nearly_equal(run_padded(rows), alone, dtype)
                if packed is not None:
                    offset = _position_offset(model, configs, rows, packed, alone)
            except Exception:
                _LOG.debug("%s is run row by row", type(model).__name__, exc_info=True)
        factors.forward_state.restore()
        factors.examine(model, dtype)
    longest, longest_padded = _known_lengths(model, configs, factors, windows)
    return PackingVerdict(
        offset is not None, offset or 0, together, longest, longest_padded, auxiliary
    )


def _known_lengths(
    model: Any, configs: Sequence[Any], factors: RotaryFactors, windows: set[int]
) -> tuple[int, int]:
    """Up to how many tokens a packed pass, and a padded sample, are known to be right.

    A model that ignores the positions it is given may count tokens itself and look up a table of
    positions; what it does beyond the smallest table of its configuration has not been tried. Code
    from outside transformers may do so by the length of the whole pass, even if it uses positions.
    """
    longest, longest_padded = smallest_unexplained(model, configs, windows), UNBOUNDED
    positions = [n for n in positions_of(model.config) if n > sum(LENGTHS)]
    if positions and not factors.uses_positions:
        longest_padded = positions[0]
    if positions and not (factors.uses_positions and _of_transformers(model)):
        longest = min(longest, positions[0])
    return longest, longest_padded


def _position_offset(
    model: Any,
    configs: Sequence[Any],
    rows: Sequence[Tokens],
    packed: Callable[[Sequence[Tokens], int], Tensor],
    alone: Tensor,
) -> int | None:
    """Where the positions of packed samples begin; None: they cannot be packed."""
    padding = getattr(model.config, "pad_token_id", None) or 0
    for offset in (0, padding + 1):
        try:
            with computing_in(configs, alone.dtype):
                logits = packed(rows, offset)
        except Exception:  # for example positions beyond a table
            continue
        if nearly_equal(logits, alone, alone.dtype) and keeps_samples_apart(
            model, rows, partial(packed, rows, offset)
        ):
            return offset
    return None


def _of_transformers(model: Any) -> bool:
    """Whether the model's code is transformers' own, which takes positions from `position_ids`."""
    return type(model).__module__.startswith("transformers.models.")


# --- what is tried ---


def keeps_samples_apart(model: Any, rows: Sequence[Tokens], packed: Callable[[], Tensor]) -> bool:
    """Whether the second of three samples has no influence on the two others.

    Args:
        model: whose input embeddings are made NaN where they are the second sample's.
        rows: three samples.
        packed: their logits, one sample after the other, from one pass.
    """
    begin, length = len(rows[0]["input_ids"]), len(rows[1]["input_ids"])
    total = sum(len(row["input_ids"]) for row in rows)

    def poison(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        flat = out.reshape(-1, out.shape[-1]).clone()
        if len(flat) == total:
            flat[begin : begin + length] = float("nan")
        return flat.view_as(out)

    handle = model.get_input_embeddings().register_forward_hook(poison)
    try:
        logits = packed()
    finally:
        handle.remove()
    counts = [1 if "label" in row else len(row["input_ids"]) - 1 for row in rows]
    first, second, third = (torch.isfinite(x) for x in logits.split(counts))
    return bool(first.all() and third.all() and not second.any())


# --- a loss of the model's own beside the cross-entropy ---


def auxiliary_share(model: Any, configs: Sequence[Any], dtype: torch.dtype) -> float:
    """The share in the model's own loss `CE + share aux_loss`; 0 where it has no auxiliary loss.

    Raises:
        InputError: `output_router_logits` is set and the loss is not of that form.
    """
    if not any(getattr(config, "output_router_logits", False) for config in configs):
        return 0.0
    source = torch.Generator().manual_seed(1)
    vocabulary = vocabulary_size(model)
    shares = []
    for length in (11, 16):
        ids = torch.randint(vocabulary, (1, length), generator=source)
        ids = ids.to(device_of(model))
        with torch.no_grad(), computing_in(configs, dtype):
            out = model(input_ids=ids, labels=ids, use_cache=False)
            plain = F.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:])
            extra = float(out.loss - plain)
            aux = getattr(out, "aux_loss", None)
        if abs(extra) <= BOUNDS[dtype] * float(plain):
            extra = 0.0
        shares.append(0.0 if extra == 0 else extra / float(aux or "nan"))
    first, second = shares
    if not abs(first - second) <= 1e-3 * abs(first):
        raise InputError(
            "output_router_logits: true in the model's config.json adds an auxiliary loss to "
            f"{type(model).__name__}'s own that is no multiple of its aux_loss, as it would have "
            "to be here; set it to false in config.json to train on the cross-entropy alone"
        )
    return float(f"{second:.6g}")
