"""The adapter sum: its definition, and what computes it."""
