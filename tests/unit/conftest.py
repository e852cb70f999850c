"""Holds unit tests to what they are: no run, no process, no long computation."""

from support.unit_guard import only_a_unit, pytest_runtest_call  # noqa: F401
