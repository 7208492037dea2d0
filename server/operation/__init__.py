"""What surrounds every request: who may, how often, for how long; and what is told of it."""
