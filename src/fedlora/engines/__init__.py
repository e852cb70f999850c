"""Carries messages between server and clients: in a process, to workers, to sites."""
