"""Where recipes meet models: which layers, in which order, from which files, and what it cost."""
