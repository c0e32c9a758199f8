"""Triton kernels; their numerics are those of the torch code beside them, which the tests compare to the bit."""
