"""The aggregation rules, each in a file of its own.

Adding one is a new file with a `RULE` and a line in this table.
"""

from __future__ import annotations

from fedlora.methods import exact, fedit, flora, zero_pad
from fedlora.methods.rule import Rule

METHODS: dict[str, Rule] = {
    "fedit": fedit.RULE,  # Zhang et al., ICASSP 2024, arXiv 2305.05644
    "zero_pad": zero_pad.RULE,  # baseline of Wang et al., NeurIPS 2024, arXiv 2409.05976
    "flora": flora.RULE,  # Wang et al., NeurIPS 2024, arXiv 2409.05976
    "exact": exact.RULE,  # this project: FLoRA without the reset
}

__all__ = ["METHODS", "Rule"]
