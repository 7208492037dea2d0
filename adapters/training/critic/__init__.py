"""Classifiers of critical tokens (arXiv 2402.17982)."""
