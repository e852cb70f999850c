"""Collects the aggregation rules, each of which is a file of its own.

Adding one is a new file with a `RULE` and a line in this table. Merges of adapters on disk, which
are no rules of rounds, have a table of their own (`merges`).
"""

from __future__ import annotations

from dataclasses import fields

from fedlora.methods import (
    exact,
    fedex,
    fedit,
    fedmomentum,
    fedsa,
    fedsvd,
    ffa,
    flexlora,
    flora,
    florist,
    hetlora,
    lora_fair,
    raflora,
    rolora,
    zero_pad,
)
from fedlora.methods.merges import MERGES
from fedlora.methods.rule import Rule

METHODS: dict[str, Rule] = {
    "exact": exact.RULE,  # this project: FLoRA without the reset
    "fedit": fedit.RULE,  # Zhang et al., ICASSP 2024, arXiv 2305.05644
    "zero_pad": zero_pad.RULE,  # baseline of Wang et al., NeurIPS 2024, arXiv 2409.05976
    "hetlora": hetlora.RULE,  # Cho et al., EMNLP 2024, arXiv 2401.06432
    "ffa": ffa.RULE,  # Sun et al., ICLR 2024, arXiv 2403.12313
    "rolora": rolora.RULE,  # Chen et al., arXiv 2502.01755
    "fedsa": fedsa.RULE,  # Guo et al., ICLR 2025, arXiv 2410.01463
    "flora": flora.RULE,  # Wang et al., NeurIPS 2024, arXiv 2409.05976
    "florist": florist.RULE,  # Ramesh and Dass, MLSys 2026, arXiv 2506.09199
    "flexlora": flexlora.RULE,  # Bai et al., NeurIPS 2024, arXiv 2402.11505
    "fedex": fedex.RULE,  # Singhal et al., ACL 2025, arXiv 2410.09432
    "fedsvd": fedsvd.RULE,  # Lee et al., NeurIPS 2025, arXiv 2505.12805
    "fedmomentum": fedmomentum.RULE,  # Yan et al., arXiv 2603.08014
    "raflora": raflora.RULE,  # Wu et al., arXiv 2602.13486
    "lora_fair": lora_fair.RULE,  # Bian et al., ICCV 2025, arXiv 2411.14961
}

ONE_SHOT = tuple(name for name, rule in METHODS.items() if rule.one_shot)
"""Rules that can combine adapters without a shared start."""


def rule_keys() -> set[str]:
    """The names of all options that any rule has."""
    return {f.name for rule in METHODS.values() for f in fields(rule.options)}


__all__ = ["MERGES", "METHODS", "ONE_SHOT", "Rule", "rule_keys"]
