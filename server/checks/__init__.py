"""Checks of a configuration before anything is loaded."""
