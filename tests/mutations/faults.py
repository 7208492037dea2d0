"""All faults, in one row: their numbers are those of `python -m tests.mutations --only`."""

from tests.mutations import in_adapters, in_server, in_steering
from tests.mutations.fault import Fault

FAULTS: tuple[Fault, ...] = (*in_steering.FAULTS, *in_adapters.FAULTS, *in_server.FAULTS)
