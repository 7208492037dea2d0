"""The streams of an engine: their models, configurations and attention layers."""
