"""Runs `fedlora watch`."""
