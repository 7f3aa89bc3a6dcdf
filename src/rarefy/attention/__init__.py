"""Sparse attention: an estimator scores blocks of keys, a selector chooses among them, an executor reads the chosen."""
