"""Runs the command line when the package is called as `python -m fedlora`."""

import sys

from fedlora.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
