"""Decoding: one token step as a list of operations, what executes it, and the cache it fills."""
