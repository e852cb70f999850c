"""Says whether this machine is ready for a run: `fedlora doctor`."""
