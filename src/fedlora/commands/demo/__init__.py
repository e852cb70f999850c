"""Shows on the embedded model what fedlora is for: `fedlora demo`."""
