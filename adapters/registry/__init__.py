"""Which adapters there are: records in Redis, shared by all replicas of a server."""
