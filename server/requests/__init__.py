"""A request, from its fields to the engine's input."""
