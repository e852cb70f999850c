"""What the tests of completion share."""

from __future__ import annotations

from fedlora.commands.completion import known_verbs

KNOWN = known_verbs()
