"""Atoms of a cell from the sites of its asymmetric unit: one atom a place, also where places are written with few digits."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from gnome.crystals.cif_operations import Operations
from gnome.crystals.cif_sites import Sites
from gnome.errors import InvalidCrystal

SAME_PLACE: Final = 0.02
"""Angstrom between two images of a site that are one atom, whatever the digits: no two atoms come so near."""
MOST_APART: Final = 0.2
"""Angstrom between two images that few digits may set apart: 0.33 and 0.67 in a wide cell."""
_OF_A_UNIT: Final = 0.7  # how far a coordinate is from what was meant: half a unit when rounded, 2/3 where 0.6666 stands for 2/3
_MOST_UNIT: Final = 0.01  # 0 and 0.5 are not given to a tenth
_GRID_START: Final = 0.0137219387  # so that no usual coordinate lies between two cells of the grid
_GRID: Final = 100_000


@dataclass(frozen=True, eq=False)
class Orbits:
    """Of each site that is listed (n): its label, how many atoms it stands for, and how many sites are listed for these."""

    labels: tuple[str, ...]
    lengths: NDArray[np.int64]
    n_listed: NDArray[np.int64]


def expand(
    sites: Sites, operations: Operations, lattice: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], Orbits]:
    """All atoms of the cell: atomic numbers (n) and fractional coordinates (n, 3) in [0, 1), site by site; and the sites' orbits.

    A site within its digits of a special position is moved onto it and has that position's multiplicity.  A site that is another's image is
    the same atom.  Raises InvalidCrystal with reason `disordered` where sites share a place, `overlap` where a multiplicity is in doubt.
    """
    orbits = [
        _orbit(coords, unit, operations, lattice, label)
        for coords, unit, label in zip(sites.frac_coords, sites.units, sites.labels, strict=True)
    ]
    owners = _owners(sites, orbits, lattice)
    kept = [i for i, owner in enumerate(owners) if i == owner]
    numbers = np.concatenate([np.full(len(orbits[i]), sites.atomic_numbers[i]) for i in kept])
    n_listed = np.bincount(owners, minlength=len(orbits))[owners]
    found = Orbits(sites.labels, np.array([len(orbit) for orbit in orbits]), n_listed)
    return numbers, np.concatenate([orbits[i] for i in kept]), found


def _orbit(
    coords: NDArray[np.float64], unit: NDArray[np.float64], operations: Operations, lattice: NDArray[np.float64], label: str
) -> NDArray[np.float64]:
    """Images (m, 3) of a site, each once."""
    if len(operations) == 1:
        return _wrapped(coords[None])
    change = _changes(coords, operations)
    apart = np.linalg.norm(change @ lattice, axis=1)
    factors = np.abs(operations.rotations - np.eye(3, dtype=np.int64))
    rounding = _OF_A_UNIT * factors @ np.minimum(unit, _MOST_UNIT) + 1e-6
    stays = (apart <= SAME_PLACE) | ((apart <= MOST_APART) & (np.abs(change) <= rounding).all(axis=1))
    for _ in range(4):  # the mean of a group's images is a place that the group leaves as it is
        coords = coords + change[stays].mean(axis=0)
        change = _changes(coords, operations)
        apart = np.linalg.norm(change @ lattice, axis=1)
        stays = apart <= SAME_PLACE
        if apart[stays].max() < 1e-6:
            break
    places = _wrapped(operations.rotations @ coords + operations.translations)
    cells = np.floor((places + _GRID_START) % 1.0 * _GRID)
    _, first, counts = np.unique(cells, axis=0, return_index=True, return_counts=True)
    if (counts != np.count_nonzero(stays)).any() or apart[stays].max() >= 1e-6:
        raise InvalidCrystal(
            "overlap",
            f"the site {label[:40]!r} is so near a special position that its multiplicity is in doubt; write more digits",
        )
    return places[np.sort(first)]


def _changes(coords: NDArray[np.float64], operations: Operations) -> NDArray[np.float64]:
    """By how much each operation moves a place, to the nearest image."""
    change = operations.rotations @ coords + operations.translations - coords
    return np.asarray(change - np.rint(change))


def _wrapped(coords: NDArray[np.float64]) -> NDArray[np.float64]:
    wrapped = coords % 1.0
    return np.where(wrapped >= 1.0, 0.0, wrapped)


def _owners(sites: Sites, orbits: list[NDArray[np.float64]], lattice: NDArray[np.float64]) -> list[int]:
    """The site of which each is an image, mostly itself: files list whole orbits beside the operations at times."""
    owner = np.concatenate([np.full(len(orbit), i) for i, orbit in enumerate(orbits)])
    shortest = float(np.linalg.svd(lattice, compute_uv=False).min())  # angstrom that a step of 1 in fractions takes at least
    tree = cKDTree(np.concatenate(orbits), boxsize=1.0)
    owners = list(range(len(orbits)))
    for one, other in sorted({(owner[i], owner[j]) for i, j in tree.query_pairs(SAME_PLACE / shortest) if owner[i] != owner[j]}):
        difference = orbits[other][:, None] - orbits[one][None]
        apart = np.linalg.norm((difference - np.rint(difference)) @ lattice, axis=-1)
        if apart.min() > SAME_PLACE:
            continue
        itself = sites.frac_coords[one] - sites.frac_coords[other]
        listed_twice = np.linalg.norm((itself - np.rint(itself)) @ lattice) <= SAME_PLACE
        if listed_twice or sites.atomic_numbers[one] != sites.atomic_numbers[other] or len(orbits[one]) != len(orbits[other]):
            labels = f"{sites.labels[one][:40]} and {sites.labels[other][:40]}"
            raise InvalidCrystal("disordered", f"sites share a place ({labels}); give an ordered crystal")
        owners[int(other)] = owners[int(one)]
    return owners
