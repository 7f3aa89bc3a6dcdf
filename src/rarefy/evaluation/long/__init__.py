"""What a model still makes of a long context: sessions of questions about one text, and likelihood by position."""
