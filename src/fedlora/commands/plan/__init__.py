"""Holds `fedlora plan`: what a run would take, before anything is loaded."""
