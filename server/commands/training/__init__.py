"""The recipes of `coxswain train`, one module each. Torch is imported only when one runs."""
