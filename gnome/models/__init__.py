"""Networks that predict energies, their training, ensembles and checkpoints."""
