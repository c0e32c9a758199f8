"""The library: crystals, energies, models and the database of discovered crystals."""
