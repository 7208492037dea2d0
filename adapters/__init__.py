"""The adapter sum: what adapters are and where they come from."""
