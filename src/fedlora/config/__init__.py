"""Holds the configuration: keys, YAML files, the command line, single clients."""
