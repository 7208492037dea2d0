"""Where adapters come from, and the store of immutable directories that they end up in."""
