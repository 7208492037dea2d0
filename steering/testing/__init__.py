"""For authors of steering methods: the conformance kit, as pytest classes."""

from steering.testing.conformance import MethodConformance

__all__ = ["MethodConformance"]
