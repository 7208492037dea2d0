"""Keys, rate limits and time limits of every request; access log, metrics and traces."""
