"""How numbers are computed: every op declared once in ``ops``, its oracle in ``reference``, fast kernels beside it."""
