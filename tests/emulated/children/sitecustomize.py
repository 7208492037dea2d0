"""Prepares the processes that an emulated test starts, as the plugin prepares the test's own.

Python runs this first in every process whose `PYTHONPATH` has this folder.
"""

from tests.emulated import triton_cpu

triton_cpu.install()
