"""Reads, combines and writes PEFT adapters on disk."""
