"""How numbers are stored: grids give codes their meaning, patterns say which are kept, terms add up to a weight."""
