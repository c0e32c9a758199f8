"""Evaluators: what relaxes a crystal and gives its energy, from a machine-learned potential to a DFT code."""
