"""Holds the federated round: messages, the server, and how updates become one."""
