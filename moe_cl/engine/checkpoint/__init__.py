"""Checkpoints: one directory a step, complete or not there, readable at any number of ranks (docs/checkpoints.md)."""
