"""The library: crystals, energies, models and the database of discovered crystals."""

__version__ = "0.1.0"
