"""Compares the bases of adapters by fingerprints of their weights, where runs have left them.

A run writes a fingerprint of its base into the state of every saved round
(`round-N/state/state.json`, `extra.base`). An adapter in a run's directory has that; others tell no
more of their base than its name and the shapes of its modules.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedlora.adapters.saved_adapter import SavedAdapter

_STATE = "state/state.json"
_CONFIG = "config.yaml"


def base_fingerprint(path: Path) -> str:
    """The fingerprint of an adapter's base, of the run in whose directory it lies; "": none.

    Args:
        path: of the adapter: a `round-N`, `final`, or a client's directory in them.
    """
    near = [path, *path.resolve().parents[:2]]
    run = next((place for place in near if (place / _CONFIG).is_file()), None)
    states = [place / _STATE for place in near]
    if run is not None:
        states += sorted(run.glob(f"round-*/{_STATE}"), reverse=True)
    for state in states:
        try:
            found = json.loads(state.read_text(encoding="utf-8"))["extra"]["base"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(found, str) and found:
            return found
    return ""


def compare_bases(adapters: Sequence[SavedAdapter], same_base: bool) -> tuple[str, list[str]]:
    """How far the adapters' bases could be compared, and what the user should know.

    Args:
        adapters: from one of the loaders.
        same_base: the user says that they are one.

    Returns:
        A sentence on what was compared; a note where fingerprints differ.
    """
    held = [(a.source, base_fingerprint(Path(a.source)) if a.source else "") for a in adapters]
    without = [source or "an adapter" for source, fingerprint in held if not fingerprint]
    known = dict.fromkeys(fingerprint for _, fingerprint in held if fingerprint)
    if len(known) > 1 and not same_base:
        first = {fingerprint: source for source, fingerprint in reversed(held)}
        return "bases compared by fingerprints of their weights, which differ", [
            f"{' and '.join(first[x] for x in known)}: the fingerprints of their bases' weights "
            "differ: these are two models, or one in two precisions. --same_base (same_base=True) "
            "says that it is one"
        ]
    if not known:
        return "bases compared by names and shapes alone: no adapter has a fingerprint", []
    if without:
        some = ", ".join(without[:3]) + (" ..." if len(without) > 3 else "")
        return f"bases compared by names and shapes alone: no fingerprint beside {some}", []
    return "bases compared by fingerprints of their weights", []
