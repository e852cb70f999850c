"""Holds a run's life: session, course, directory and what is reported of it."""
