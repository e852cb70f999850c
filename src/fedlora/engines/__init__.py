"""Carries messages between the server and the clients, today within one process."""
