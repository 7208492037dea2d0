"""Inside vLLM's worker process: the steered model and what feeds it, step by step."""
