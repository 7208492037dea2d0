"""The model side of Coxswain: what to mix (methods, plans) and how (the worker)."""
