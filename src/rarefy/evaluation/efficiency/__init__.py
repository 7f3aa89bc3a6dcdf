"""What running a model costs: memory, compute, latency, throughput, energy and compression, by stated definitions."""
