"""Value models for value-augmented sampling (arXiv 2405.06639)."""
