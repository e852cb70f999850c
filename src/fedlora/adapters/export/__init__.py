"""Writes a model for other programs: an adapter of one rank, MLX's files, or merged weights."""
