"""Puts adapters into a base model, and runs the rows of several clients in one pass."""
