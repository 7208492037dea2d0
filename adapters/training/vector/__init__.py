"""Steering vectors from contrasts: difference of means, or the differences' first component."""
