"""Gives whole runs in this process the bases that they share."""

from support.kept_bases import fresh_bases, kept_bases  # noqa: F401
