"""Native kernels for x86-64 processors: a C library (csrc/), the layouts it reads, and the op over both."""
