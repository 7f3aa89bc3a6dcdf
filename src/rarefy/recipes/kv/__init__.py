"""KV caches in code: one file per published method."""
