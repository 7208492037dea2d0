"""Tests of Triton kernels, run by `tests.interpreted` in a process that interprets them."""
