"""What the tests of two threads share."""

from __future__ import annotations

THREADS, ROUNDS = 2, 3
