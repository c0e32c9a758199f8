"""Networks small enough to train in a test."""

import numpy as np
import torch

from gnome.crystals.crystal import Crystal
from gnome.models.structural import StructuralNetwork, StructuralSettings

SMALL = StructuralSettings(width=16, steps=2, cutoff=4.0, shift=-1.0)


def small_network(seed: int = 0) -> StructuralNetwork:
    torch.manual_seed(seed)
    return StructuralNetwork(SMALL)


def other_descriptions(original: Crystal) -> list[Crystal]:
    """Describe a crystal of four atoms in other ways: turned, moved, renumbered, in another cell, and in a double one."""
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    order = np.array([2, 0, 3, 1])
    skew = np.array([[1, 0, 0], [1, 1, 0], [0, -1, 1]])
    return [
        Crystal(original.lattice @ rotation, original.atomic_numbers, original.frac_coords),
        Crystal(original.lattice, original.atomic_numbers, original.frac_coords + np.array([0.3, -0.2, 5.1])),
        Crystal(original.lattice, original.atomic_numbers[order], original.frac_coords[order]),
        Crystal(skew @ original.lattice, original.atomic_numbers, original.frac_coords @ np.linalg.inv(skew)),
        Crystal(
            original.lattice * np.array([[1.0], [2.0], [1.0]]),
            np.tile(original.atomic_numbers, 2),
            np.concatenate([(original.frac_coords + np.array([0, shift, 0])) / [1, 2, 1] for shift in (0, 1)]),
        ),
    ]
