"""vLLM's two model runners: the views of them, and speculation on each."""
