"""Question-answering tasks: their data in local files, their scores, and the difference from the dense model."""
