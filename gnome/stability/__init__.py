"""Formation energies, convex hulls and what a crystal decomposes to; one hull per evaluation method."""
