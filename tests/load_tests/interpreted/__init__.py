"""Tests of checks of GPU kernels, run by `tests.interpreted` in a process that interprets them."""
