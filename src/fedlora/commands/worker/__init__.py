"""Serves the rows and the model of one site to a federation: `fedlora worker`."""
