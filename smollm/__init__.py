"""A real language model to look at and to measure: SmolLM2-135M-Instruct, without a model hub."""
