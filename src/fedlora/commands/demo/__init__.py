"""Runs `fedlora demo`."""
