"""Says what an aggregator is: it combines the encoded updates of a round, one way a file."""

from __future__ import annotations

from typing import Protocol

from fedlora.methods.values import Encoded


class Aggregator(Protocol):
    """What the server folds a round's encoded updates into.

    It knows no rule, and is chosen beside one: the weighted mean (`mean.Mean`), or one that is
    robust against false updates, or one that sees only masked ones. One aggregator serves a whole
    run, so that it may remember earlier rounds; the server calls, round by round,

        begin()     fold(encoded, weight), once for every update that counts     result()

    Updates are folded in ascending order of the clients, whatever the order they arrive in, so that
    the same updates give the same bits.
    """

    weight: float
    """The sum of the weights folded since `begin`; 0 where nothing was."""

    is_mean: bool
    """Whether `result` is the weighted mean and nothing else."""

    def begin(self) -> None:
        """A round opens: forget what was folded."""

    def fold(self, encoded: Encoded, weight: float) -> None:
        """Take one update in.

        Args:
            encoded: what the rule needs of it, the rule's shift included.
            weight: `w_k > 0`, before normalisation.
        """

    def result(self, normalised: bool = True) -> Encoded:
        """What the updates come to together; asked for once a round, after at least one `fold`.

        Args:
            normalised: weights are to sum to one; False where a rule fixes them (FLoRA's ablation).
                Parameters trained whole (`DENSE`) are averaged in either case.
        """
        ...
