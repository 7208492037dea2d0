"""MeteoRA: gates that route each token to the LoRA adapters of a pack (arXiv 2405.13053)."""
