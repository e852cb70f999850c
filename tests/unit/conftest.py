"""Holds unit tests to what they are: no run and no process."""

from support.unit_guard import only_a_unit  # noqa: F401
