"""Makes the folders of a federation whose messages NVIDIA FLARE carries."""
