"""Finds out whether a model's samples can lie side by side without padding.

The judge is the model's own forward pass of every sample alone. Both are computed in float64 by the
model's own modules (`wide.py`), so that a difference is an error and not rounding, whatever the
dtype of the base. Whether anything of one sample gets to another is decided without any bound: the
embeddings of one are made NaN, which no weight, however small, can hide (`keeps_samples_apart`).

What depends on lengths beyond those tried: masks are the model's own at any length
(`attention.sample_mask`); rotary factors that follow the longest sample are looked for at positions
far out (`RotaryFactors`); a number of the configuration that may be a length, and that neither
explains, bounds the tokens of a pass (`smallest_unexplained`).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.model.packed_attention import noting_windows
from fedlora.model.wide import (
    BOUNDS,
    SAME_SHAPES,
    ForwardState,
    computing_in,
    nearly_equal,
    wide_dtype,
)

LENGTHS = (7, 9, 12)
"""Tokens of the samples that are tried: two of them are padded to one length inside attention."""
UNBOUNDED = 2**62
Run = Callable[[Sequence[Tokens]], Tensor]
"""Samples -> the logits of all their labelled tokens, or of all samples, one after the other."""


@dataclass(frozen=True)
class PackingVerdict:
    """How a model is to be run.

    Args:
        packed: samples may lie side by side, their positions counted from `offset`.
        offset: of the first position.
        together: samples of different lengths can be padded to one length.
        longest: tokens of a packed pass up to which it is known to be right.
        longest_padded: of a sample up to which it is known that padding changes nothing.
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
    own: Run,
    packed: Callable[[Sequence[Tokens], int], Tensor] | None,
) -> PackingVerdict:
    """Hold a packed pass, and a padded one, against the model's own of each row alone.

    Args:
        model: in evaluation mode, without adapters; nothing of it changes.
        configs: its own and those of its parts.
        factors: that have not been found out yet.
        rows: as `random_rows` gives them.
        own: the model's own forward pass of padded samples.
        packed: a packed pass, positions counted from a number; None: there is none.

    Raises:
        InputError: see `auxiliary_share`.
    """
    dtype, classifier = wide_dtype(model), "label" in rows[0]
    with torch.no_grad():
        auxiliary = 0.0 if classifier else auxiliary_share(model, configs, dtype)
        together, offset = False, None
        with noting_windows() as windows:
            # Whatever an architecture stumbles over here: rows of one length can be run together.
            try:
                with computing_in(configs, dtype):
                    alone = torch.cat([own([row]) for row in rows])
                    together = nearly_equal(own(rows), alone, dtype)
                if packed is not None:
                    offset = _position_offset(model, configs, rows, packed, alone)
            except Exception:
                pass
        factors.forward_state.restore()
        factors.examine(model, dtype)
    positions = [n for n in positions_of(model.config) if n > sum(LENGTHS)]
    longest, longest_padded = smallest_unexplained(model, configs, windows), UNBOUNDED
    if positions and not factors.uses_positions:
        longest_padded = positions[0]
    if positions and not (factors.uses_positions and _of_transformers(model)):
        longest = min(longest, positions[0])
    return PackingVerdict(
        offset is not None, offset or 0, together, longest, longest_padded, auxiliary
    )


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
                found = packed(rows, offset)
        except Exception:  # as positions beyond a table
            continue
        if nearly_equal(found, alone, alone.dtype) and keeps_samples_apart(
            model, rows, partial(packed, rows, offset)
        ):
            return offset
    return None


def _of_transformers(model: Any) -> bool:
    """Its code is known to compute positions from `position_ids` alone."""
    return type(model).__module__.startswith("transformers.models.")


# --- what is tried ---


def random_rows(
    model: Any, padding: int, classifier: bool, lengths: Sequence[int] = LENGTHS, seed: int = 0
) -> list[Tokens]:
    """Random samples of so many tokens, all of them learnt; none is padding."""
    vocabulary = _vocabulary(model)
    source = torch.Generator().manual_seed(seed)
    rows: list[Tokens] = []
    for length in lengths:
        ids = torch.randint(vocabulary, (length,), generator=source).tolist()
        ids = [i if i != padding else (i + 1) % vocabulary for i in ids]
        if classifier:
            rows.append({"input_ids": ids, "label": 0})
        else:
            rows.append({"input_ids": ids, "labels": ids})
    return rows


def _vocabulary(model: Any) -> int:
    """Tokens that can be read and, in a language model, predicted."""
    read: int = model.get_input_embeddings().num_embeddings
    head = model.get_output_embeddings()
    written = getattr(getattr(head, "weight", None), "shape", (read,))[0]
    return min(read, written)


def keeps_samples_apart(model: Any, rows: Sequence[Tokens], packed: Callable[[], Tensor]) -> bool:
    """Whether nothing of the second of three samples gets to the two others.

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
        found = packed()
    finally:
        handle.remove()
    counts = [1 if "label" in row else len(row["input_ids"]) - 1 for row in rows]
    first, second, third = (torch.isfinite(x) for x in found.split(counts))
    return bool(first.all() and third.all() and not second.any())


# --- numbers of the configuration ---

_POSITIONS = re.compile(r"position|n_ctx|seq_?len|sequence_len|max_len|context")
_LENGTHS = re.compile(
    r"window|chunk|block_size|local_attention|span|stride|segment|distance|floor|index_topk"
)
_NO_LENGTHS = re.compile(
    r"^d_|cap$|capping|clip|depth|idx|rate|types$|shape|bins|mamba|dim|hidden|width|vocab|token|theta|base|rank|num_|^n_|layer|head|expert|channel|feature|"
    r"version|seed|year|ids?$|label|bits|factor|param|size|group|state|inner|ffn|ff$|scal|"
    r"embed|eps|norm|kernel|loss|coef|iter|top_?k|alpha|beta|multiplier|image|audio|vision|patch"
)


def _numbers(config: Any, key: str = "") -> Iterable[tuple[str, int]]:
    """All whole numbers of a configuration beyond the lengths tried, with their keys."""
    if hasattr(config, "to_dict"):
        config = vars(config)
    if isinstance(config, Mapping):
        for name, value in config.items():
            if not str(name).startswith("_"):
                yield from _numbers(value, str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _numbers(value, key)
    elif isinstance(config, int | float) and not isinstance(config, bool):
        tried = min(LENGTHS)
        if config == config and abs(config) < UNBOUNDED and int(config) == config > tried:
            yield key.lower(), int(config)


def positions_of(config: Any) -> list[int]:
    """The numbers of a configuration that are called a number of positions, ascending."""
    return sorted({n for key, n in _numbers(config) if _POSITIONS.search(key)})


def longest_table(config: Any) -> int:
    """Up to which number of positions a model has to run; 0 where its configuration has none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    found = [getattr(text, name, None) for name in names]
    return max((n for n in found if isinstance(n, int)), default=0)


def smallest_unexplained(model: Any, configs: Sequence[Any], windows: set[int]) -> int:
    """The smallest number of the configurations that may be a length and that nothing explains.

    Widths are known from the parameters; windows and chunks from the masks the model has asked for.

    Args:
        model: of which the configurations are.
        configs: its own and those of its parts.
        windows: the sizes it has told of when it asked for masks.
    """
    widths = {size for p in model.parameters() for size in p.shape}

    def bounds(key: str, n: int) -> bool:
        if _POSITIONS.search(key) or "layer" in key:
            return False
        if any(abs(n - times * w) <= 1 for w in windows for times in (1, 2)):
            return False
        if _LENGTHS.search(key):
            return True
        return not _NO_LENGTHS.search(key) and n not in widths

    found = (n for config in configs for key, n in _numbers(config) if bounds(key, n))
    return min((n for n in found if n > max(LENGTHS)), default=UNBOUNDED)


# --- rotary factors that follow the longest sample ---


@dataclass
class RotaryFactors:
    """Which lengths get the same rotary factors, so that their samples may share a pass.

    Two samples of six tokens run side by side, the second at positions up to `length - 1`; where
    that changes the first, factors follow the longest sample (`rope_type` longrope, dynamic).

    Args:
        model: asked with `position_ids` of its own forward pass.
        forward_state: of the model.
        configs: the model's and those of its parts.
        padding: a token that is no padding has another id.
    """

    forward_state: ForwardState
    configs: Sequence[Any]
    padding: int
    uses_positions: bool = False
    """The model's forward pass goes by the positions it is given."""
    follow_longest: bool = False
    """RotaryFactors differ between lengths."""

    def __post_init__(self) -> None:
        self.lengths = list[int]()  # ascending
        self.classes = list[int]()  # of each of them
        self.results = list[Tensor]()  # of each class

    def examine(self, model: Any, dtype: torch.dtype) -> None:
        """Try the longest length the configuration has against a short one."""
        self.dtype = dtype
        plain = self._run(model, 6)
        if plain is None:
            return
        moved = self._run(model, 9)
        self.uses_positions = moved is not None and not nearly_equal(
            moved[1], plain[1], dtype, SAME_SHAPES
        )
        self.results.append(plain[0])
        self._note(6, 0)
        if not self.uses_positions:
            return
        longest = longest_table(model.config)
        if longest > max(LENGTHS):
            self._find_class(model, longest)
        if self.follow_longest:
            for length in positions_of(model.config):
                if length < longest:
                    self._find_class(model, length)
                    self._find_class(model, length + 1)

    def class_of(self, model: Any, length: int) -> int:
        """The class of a length: samples of one class may share a pass."""
        if not self.uses_positions:
            return 0
        at = bisect.bisect_left(self.lengths, length)
        if at == 0 or (at < len(self.lengths) and self.lengths[at] == length):
            return self.classes[at]
        if at < len(self.lengths) and self.classes[at - 1] == self.classes[at]:
            return self.classes[at]
        return self._find_class(model, length)

    def _find_class(self, model: Any, length: int) -> int:
        found = self._run(model, length)
        if found is None:  # beyond a table of positions, where no pass can be run
            return -length
        for number, wanted in enumerate(self.results):
            if nearly_equal(found[0], wanted, self.dtype, SAME_SHAPES):
                return self._note(length, number)
        self.follow_longest = True
        self.results.append(found[0])
        return self._note(length, len(self.results) - 1)

    def _note(self, length: int, number: int) -> int:
        at = bisect.bisect_left(self.lengths, length)
        if at == len(self.lengths) or self.lengths[at] != length:
            self.lengths.insert(at, length)
            self.classes.insert(at, number)
        return number

    def _run(self, model: Any, length: int) -> tuple[Tensor, Tensor] | None:
        """Logits of the first sample, and of the second, which reaches up to this length."""
        device = next(model.parameters()).device
        vocabulary = _vocabulary(model)
        ids = torch.arange(12, device=device).view(2, 6) % vocabulary
        ids = torch.where(ids == self.padding, (ids + 12) % vocabulary, ids)
        steps = torch.arange(6, device=device)
        places = torch.stack([steps, steps.where(steps < 3, steps + length - 6)])
        training = model.training
        model.eval()
        self.forward_state.restore()
        try:
            with torch.no_grad(), computing_in(self.configs, self.dtype):
                logits = model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places
                ).logits
        except Exception:  # it takes no positions, or has none of these
            return None
        finally:
            self.forward_state.restore()
            model.train(training)
        return logits[0], logits[1]


# --- a loss of the model's own beside the cross-entropy ---


def auxiliary_share(model: Any, configs: Sequence[Any], dtype: torch.dtype) -> float:
    """By how much the model's own loss counts its auxiliary loss: `loss = CE + share aux_loss`.

    Raises:
        InputError: `output_router_logits` is set and the loss is not of that form.
    """
    if not any(getattr(config, "output_router_logits", False) for config in configs):
        return 0.0
    source = torch.Generator().manual_seed(1)
    vocabulary = _vocabulary(model)
    shares = []
    for length in (11, 16):
        ids = torch.randint(vocabulary, (1, length), generator=source)
        ids = ids.to(next(model.parameters()).device)
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
