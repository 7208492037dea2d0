"""Adapters in the server: residency in the engine, names in requests, and the registry."""
