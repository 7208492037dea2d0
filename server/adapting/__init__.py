"""Adapters in the server: what the engine holds, what requests may name, and the registry."""
