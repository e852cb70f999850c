"""Finds out which lengths get the same rotary factors, so that their samples may share a pass."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.model.config_lengths import longest_table, positions_of
from fedlora.model.device import device_of
from fedlora.model.trial_rows import LENGTHS, vocabulary_size
from fedlora.model.wide import SAME_SHAPES, ForwardState, computing_in, nearly_equal


@dataclass
class RotaryFactors:
    """Divides sample lengths into classes whose samples may share a pass.

    Some models choose their rotary factors by the longest sample of a pass (`rope_type` longrope or
    dynamic). To find out, two samples of six tokens are run side by side, the second at positions
    up to `length - 1`. Lengths for which the first sample's logits agree are one class.

    Args:
        forward_state: of the model.
        configs: the model's and those of its parts.
        padding: id of the padding token.
    """

    forward_state: ForwardState
    configs: Sequence[Any]
    padding: int
    uses_positions: bool = False
    """The model's forward pass uses the positions it is given."""
    follow_longest: bool = False
    """The factors differ between lengths."""

    def __post_init__(self) -> None:
        self.lengths = list[int]()  # ascending
        self.classes = list[int]()  # of each of them
        self.results = list[Tensor]()  # of each class

    def examine(self, model: Any, dtype: torch.dtype) -> None:
        """Compare the longest length of the configuration with a short one.

        Args:
            model: in the state in which it is to be compared.
            dtype: in which passes are compared.
        """
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
        """The number of a length's class; samples of one class may share a pass."""
        if not self.uses_positions:
            return 0
        at = bisect.bisect_left(self.lengths, length)
        if at == 0 or (at < len(self.lengths) and self.lengths[at] == length):
            return self.classes[at]
        if at < len(self.lengths) and self.classes[at - 1] == self.classes[at]:
            return self.classes[at]
        return self._find_class(model, length)

    def _find_class(self, model: Any, length: int) -> int:
        logits = self._run(model, length)
        if logits is None:  # beyond a table of positions, where no pass can be run
            return -length
        for number, wanted in enumerate(self.results):
            if nearly_equal(logits[0], wanted, self.dtype, SAME_SHAPES):
                return self._note(length, number)
        self.follow_longest = True
        self.results.append(logits[0])
        return self._note(length, len(self.results) - 1)

    def _note(self, length: int, number: int) -> int:
        at = bisect.bisect_left(self.lengths, length)
        if at == len(self.lengths) or self.lengths[at] != length:
            self.lengths.insert(at, length)
            self.classes.insert(at, number)
        return number

    def _run(self, model: Any, length: int) -> tuple[Tensor, Tensor] | None:
        """Logits of the first sample and of the second, whose positions reach up to `length - 1`.

        None: the model cannot run that.
        """
        device = device_of(model)
        vocabulary = vocabulary_size(model)
        ids = torch.arange(12, device=device).view(2, 6) % vocabulary
        ids = torch.where(ids == self.padding, (ids + 12) % vocabulary, ids)
        steps = torch.arange(6, device=device)
        positions = torch.stack([steps, steps.where(steps < 3, steps + length - 6)])
        training = model.training
        model.eval()
        self.forward_state.restore()
        try:
            with torch.no_grad(), computing_in(self.configs, self.dtype):
                logits = model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions
                ).logits
        except Exception:  # it takes no positions, or its table has none so large
            return None
        finally:
            self.forward_state.restore()
            model.train(training)
        return logits[0], logits[1]
