"""Names the verbs that shells complete."""

from __future__ import annotations

from fedlora.commands.completion import known_verbs

KNOWN = known_verbs()
