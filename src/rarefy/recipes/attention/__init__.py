"""Methods that decide which blocks of keys a query reads."""
