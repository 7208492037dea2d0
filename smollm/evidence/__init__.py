"""Claims about steering and adapters, measured on a real language model against prompting."""
