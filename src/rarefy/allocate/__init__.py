"""How a budget is shared out: sensitivity tables in, choices out."""
