"""Training: the loop that survives being killed, and losses."""
