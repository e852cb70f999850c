"""Turns rows into clients' tokens."""
