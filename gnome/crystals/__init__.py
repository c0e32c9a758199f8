"""Crystals as arrays, the gate that admits them, what makes two of them the same, and their file formats."""
