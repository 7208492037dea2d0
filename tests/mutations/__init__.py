"""Faults put in by hand, each with the tests that must notice: `python -m tests.mutations`."""
