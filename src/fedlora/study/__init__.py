"""Grids of runs with one table out: `fedlora study`."""
