"""Networks small enough to train in a test."""

import torch

from gnome.models.structural import StructuralNetwork, StructuralSettings

SMALL = StructuralSettings(width=16, steps=2, cutoff=4.0, shift=-1.0)


def small_network(seed: int = 0) -> StructuralNetwork:
    torch.manual_seed(seed)
    return StructuralNetwork(SMALL)
