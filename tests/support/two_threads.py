"""Says how many threads meet, and how often."""

from __future__ import annotations

THREADS, ROUNDS = 2, 3
