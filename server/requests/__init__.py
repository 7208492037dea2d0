"""What a request asks for, from its fields to what the engine is given."""
