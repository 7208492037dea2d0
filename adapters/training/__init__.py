"""Training recipes for artefacts that are served. Torch and transformers; no vLLM."""
