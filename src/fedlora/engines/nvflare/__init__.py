"""Carries a federation over NVIDIA FLARE; only its modules import nvflare, and only when used."""
