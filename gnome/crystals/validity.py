"""The geometric gate: what no neighbour list, network or evaluator may be given.

It comes before every neighbour list, because a near-zero or needle-shaped cell makes those run for ever.  Everything here is plain
arithmetic on the arrays with a bounded cost.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import COVALENT_RADIUS, SYMBOLS
from gnome.errors import InvalidCrystal

_RADII = np.array(COVALENT_RADIUS)
_LARGEST_NUMBER = 1e6


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Limits of the gate.

    Volumes angstrom^3/atom; heights are the distances between opposite cell faces, angstrom; `min_distance_fraction` is the smallest
    allowed ratio of a distance to the sum of the two covalent radii, `min_distance` its floor in angstrom.
    """

    max_atoms: int = 400
    min_volume_per_atom: float = 2.0
    max_volume_per_atom: float = 400.0
    min_height: float = 1.0
    max_height: float = 200.0
    min_distance_fraction: float = 0.5
    min_distance: float = 0.5


DEFAULT_GATE = GateSettings()


def heights(lattice: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances (3,) between opposite faces of the cell, angstrom."""
    volume = abs(np.linalg.det(lattice))
    areas = np.linalg.norm(np.cross(lattice[[1, 2, 0]], lattice[[2, 0, 1]]), axis=1)
    return np.asarray(volume / np.maximum(areas, 1e-300))


def closest_contact(crystal: Crystal, *, reach: float = 3.0) -> tuple[float, float, int, int]:
    """Find the shortest contact relative to radii, among those up to `reach` angstrom.

    Returns the smallest ratio of distance to the sum of covalent radii, the distance there in angstrom, and the two atoms; infinite
    when no two atoms are within reach.  Exact for any cell: as many images are looked at as its heights ask for.
    """
    coords = crystal.frac_coords
    difference = coords[:, None, :] - coords[None, :, :]
    difference -= np.round(difference)
    radii = _RADII[crystal.atomic_numbers]
    sums = radii[:, None] + radii[None, :]
    n_images = np.floor(reach / heights(crystal.lattice) + 0.5).astype(int)
    best = (np.inf, np.inf, 0, 0)
    for shift in np.ndindex(*(2 * n_images + 1)):
        image = np.asarray(shift) - n_images
        distance = np.linalg.norm((difference + image) @ crystal.lattice, axis=-1)
        if not image.any():
            np.fill_diagonal(distance, np.inf)
        ratio = distance / sums
        i, j = divmod(int(ratio.argmin()), crystal.n_atoms)
        if ratio[i, j] < best[0] and distance[i, j] <= reach:
            best = (float(ratio[i, j]), float(distance[i, j]), i, j)
    return best


def check_crystal(crystal: Crystal, gate: GateSettings = DEFAULT_GATE, *, elements: frozenset[int] | None = None) -> None:
    """Admit a crystal or raise.

    `elements` are the atomic numbers that may occur; all when None.
    Raises InvalidCrystal with reason `not_finite`, `too_many_atoms`, `volume`, `cell_shape`, `overlap` or `unsupported_element`.
    """
    name = crystal.reduced_formula
    if not (np.isfinite(crystal.lattice).all() and np.isfinite(crystal.frac_coords).all()):
        raise InvalidCrystal("not_finite", f"{name}: the lattice or a coordinate is not a finite number")
    largest = max(np.abs(crystal.lattice).max(), np.abs(crystal.frac_coords).max())
    if largest > _LARGEST_NUMBER:  # beyond, the arithmetic below loses its digits or overflows
        raise InvalidCrystal(
            "not_finite", f"{name}: the lattice or a coordinate is {largest:.3g}, expected at most {_LARGEST_NUMBER:g}"
        )
    if crystal.n_atoms > gate.max_atoms:
        raise InvalidCrystal("too_many_atoms", f"{name}: {crystal.n_atoms} atoms in the cell, the limit is {gate.max_atoms}")
    if elements is not None and (unknown := sorted(set(crystal.composition) - elements)):
        raise InvalidCrystal("unsupported_element", f"{name}: {', '.join(SYMBOLS[z] for z in unknown)} not supported here")
    volume = crystal.volume_per_atom
    if not gate.min_volume_per_atom <= volume <= gate.max_volume_per_atom:
        limits = f"{gate.min_volume_per_atom:g} to {gate.max_volume_per_atom:g}"
        raise InvalidCrystal("volume", f"{name}: {volume:.3g} angstrom^3 per atom, expected {limits}")
    height = heights(crystal.lattice)
    if height.min() < gate.min_height or height.max() > gate.max_height:
        limits = f"{gate.min_height:g} to {gate.max_height:g}"
        raise InvalidCrystal("cell_shape", f"{name}: cell heights {np.round(height, 3).tolist()} angstrom, expected {limits}")
    ratio, distance, i, j = closest_contact(crystal)
    if ratio < gate.min_distance_fraction or distance < gate.min_distance:
        pair = f"{SYMBOLS[crystal.atomic_numbers[i]]}-{SYMBOLS[crystal.atomic_numbers[j]]}"
        raise InvalidCrystal("overlap", f"{name}: atoms {i} and {j} ({pair}) are {distance:.3f} angstrom apart, they overlap")


def is_valid(crystal: Crystal, gate: GateSettings = DEFAULT_GATE, *, elements: frozenset[int] | None = None) -> bool:
    """Say whether `check_crystal` would admit the crystal."""
    try:
        check_crystal(crystal, gate, elements=elements)
    except InvalidCrystal:
        return False
    return True
