"""Weight recipes."""
