"""Shortest distances between the sites of a crystal, kept so that a thousand decorations of it are gated without a neighbour list."""

import numpy as np
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import COVALENT_RADIUS
from gnome.crystals.validity import DEFAULT_GATE, GateSettings, heights

CONTACT_REACH = 4.5
"""angstrom: distances up to here are exact; the gate asks for less even after lengths shrink by a third."""

_RADII = np.array(COVALENT_RADIUS)


def shortest_contacts(crystal: Crystal, *, reach: float = CONTACT_REACH) -> NDArray[np.float64]:
    """Shortest distance between every two sites over all images, (n, n), angstrom; exact up to `reach`.

    The diagonal holds the distance of a site to its own nearest image.
    """
    difference = crystal.frac_coords[:, None, :] - crystal.frac_coords[None, :, :]
    difference -= np.round(difference)
    n_images = np.floor(reach / heights(crystal.lattice) + 0.5).astype(int)
    shortest = np.full((crystal.n_atoms, crystal.n_atoms), np.inf)
    for shift in np.ndindex(*(2 * n_images + 1)):
        image = np.asarray(shift) - n_images
        distance = np.linalg.norm((difference + image) @ crystal.lattice, axis=-1)
        if not image.any():
            np.fill_diagonal(distance, np.inf)
        np.minimum(shortest, distance, out=shortest)
    return shortest


def smallest_length_factor(
    contacts: NDArray[np.float64], atomic_numbers: NDArray[np.int64], gate: GateSettings = DEFAULT_GATE
) -> float:
    """Factor on all lengths at which the closest two atoms are as close as the gate allows.

    `contacts` (n, n) angstrom are those of the cell whatever stands on its sites, `atomic_numbers` (n,) what is put there.
    """
    radii = _RADII[atomic_numbers]
    limit = np.maximum(gate.min_distance_fraction * (radii[:, None] + radii), gate.min_distance)
    return float((limit / contacts).max())
