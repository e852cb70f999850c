"""Combines the clients' updates, one way a file."""
