"""Collects the merges of adapters on the disk, each of which is a file of its own.

Adding one is a new file with a `MERGE` and a line in this table.
"""

from __future__ import annotations

from fedlora.methods.merges import dare, magnitude_prune, ties, tsv
from fedlora.methods.merges.merge import Merge

MERGES: dict[str, Merge] = {
    "ties": ties.MERGE,  # Yadav et al., NeurIPS 2023, arXiv 2306.01708
    "dare": dare.MERGE,  # Yu et al., ICML 2024, arXiv 2311.03099
    "magnitude_prune": magnitude_prune.MERGE,  # Han et al., NeurIPS 2015, arXiv 1506.02626
    "tsv": tsv.MERGE,  # Gargiulo et al., CVPR 2025, arXiv 2412.00081
}

__all__ = ["MERGES", "Merge"]
