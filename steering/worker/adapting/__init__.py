"""The adapters of a step: where they lie, and what each layer adds."""
