"""What was gained and what it cost, on one page: results read back, drawn, and written as self-contained HTML."""
