"""What carries messages between server and clients: one process (`local`), later real networks."""
