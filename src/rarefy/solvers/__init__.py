"""How codes are found: tensors in, terms out."""
