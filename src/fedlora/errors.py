"""Defines the errors that a user can mend and that are no bugs."""

from __future__ import annotations


class FedloraError(Exception):
    """Base of all errors a user can act on; the command line prints the message and exits 2."""


class InputError(FedloraError, ValueError):
    """A configuration, file, model or data set that cannot be used; the message says what to do."""


class CheckpointError(FedloraError):
    """A saved state that cannot be written, read or trusted."""
