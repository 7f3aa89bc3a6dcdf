"""The oracle: every op in plain torch, on any device, exact about what the stored tensors mean."""
