"""Measurements of the project: which architectures run, and how fast."""
