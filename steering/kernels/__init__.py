"""The read-out sum: its float64 definition, and the paths that compute it fast."""
