"""Proposing crystals: structural and compositional generators, the ensemble filter, and the choice of what to evaluate."""
