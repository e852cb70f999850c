"""Trains and evaluates on a client's own rows."""
