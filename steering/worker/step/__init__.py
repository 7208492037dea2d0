"""The passes of one engine step: contexts, graphs, candidates and drafts."""
