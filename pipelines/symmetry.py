"""Site permutations of a crystal and the symmetry-unique ways to pick some of its sites.

Two partial substitutions of one crystal are the same crystal exactly when a symmetry operation of the crystal maps the picked sites
of one on those of the other (both give the parent back when the picked sites are filled again, so whatever maps child to child maps
parent to parent).  So it is enough to count orbits of site subsets under the permutation group of the sites; no two structures are ever
compared.  Operations that map the crystal but not its cell (possible in supercells only) are no permutations of the cell's sites: such
pairs stay apart.
"""

from dataclasses import dataclass
from math import comb

import numpy as np
from moyopy import Cell
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.identity import find_symmetry

MAX_SITES = 62
"""Sites of one element that are handled: a subset is the bits of one int64."""


@dataclass(frozen=True, kw_only=True)
class SymmetrySettings:
    """`symprec` (angstrom) is the tolerance of the symmetry search; `angle_tolerance` its own default."""

    symprec: float = 1e-2


DEFAULT_SYMMETRY = SymmetrySettings()


@dataclass(frozen=True, eq=False)
class SiteSymmetry:
    """Space group number and the distinct permutations (g, n) of the sites: site i goes to `permutations[:, i]`."""

    space_group_number: int
    permutations: NDArray[np.int64]


def site_symmetry(crystal: Crystal, settings: SymmetrySettings = DEFAULT_SYMMETRY) -> SiteSymmetry:
    """Find how symmetry permutes the sites of the cell.

    A cell whose symmetry cannot be determined has space group 1 and the identity alone: its groupings are all taken as different.
    """
    identity = np.arange(crystal.n_atoms)[None, :]
    cell = Cell(crystal.lattice.tolist(), crystal.frac_coords.tolist(), crystal.atomic_numbers.tolist())
    try:
        found = find_symmetry(cell, settings.symprec)
    except ValueError:
        return SiteSymmetry(1, identity)
    rotations = np.array(found.operations.rotations, dtype=np.float64)
    translations = np.array(found.operations.translations)
    moved = np.einsum("gij,nj->gni", rotations, crystal.frac_coords) + translations[:, None, :]
    difference = moved[:, :, None, :] - crystal.frac_coords
    difference -= np.round(difference)
    distance = np.linalg.norm(difference @ crystal.lattice, axis=-1)
    distance[:, crystal.atomic_numbers[:, None] != crystal.atomic_numbers] = np.inf
    images = distance.argmin(axis=2)
    is_permutation = (np.sort(images, axis=1) == np.arange(crystal.n_atoms)).all(axis=1)
    permutations = np.unique(np.vstack([identity, images[is_permutation]]), axis=0)
    return SiteSymmetry(int(found.number), permutations)


@dataclass(frozen=True, kw_only=True)
class GroupingLimits:
    """How many groupings of sites are considered.

    A level (a number of picked sites) with at most `max_enumerated` orbits in its lower half is listed completely, others are sampled with
    `n_samples` random picks.  Of each level at most `max_per_level` groupings are kept, chosen at random.
    """

    max_enumerated: int = 500
    n_samples: int = 200
    max_per_level: int = 12


class SiteGroupings:
    """Symmetry-unique subsets of some sites of a crystal.

    `sites` (m,) are the sites of one element and `permutations` (g, n) those of the whole cell.  A subset is the bits of an integer over
    positions in `sites`; an orbit is represented by its smallest integer.
    """

    def __init__(self, sites: NDArray[np.int64], permutations: NDArray[np.int64]) -> None:
        """Restrict the permutations to the sites.  Raises ValueError for more than `MAX_SITES` sites."""
        if len(sites) > MAX_SITES:
            raise ValueError(f"{len(sites)} sites of one element, at most {MAX_SITES} are handled")
        self.sites = sites
        position = np.full(permutations.shape[1], -1)
        position[sites] = np.arange(len(sites))
        self._images = np.unique(position[permutations[:, sites]], axis=0)  # (g, m)
        self._weights = (np.int64(1) << self._images).T.astype(np.int64)  # (m, g): bit that a site becomes
        self._levels: dict[int, NDArray[np.bool_]] = {0: np.zeros((1, len(sites)), dtype=bool)}

    def canonical(self, subsets: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Smallest integer (s,) in the orbit of each subset (s, m)."""
        return np.asarray((subsets.astype(np.int64) @ self._weights).min(axis=1))

    def orbits(self, level: int, max_orbits: int | None = None) -> NDArray[np.bool_] | None:
        """Representatives (s, m) of all subsets of `level` sites, or None when some level up to it has more than `max_orbits`.

        Grown one site at a time: every subset contains a smaller one, whose orbit is known.  Above half filling the complements are used.
        """
        m = len(self.sites)
        if level > m // 2:
            lower = self.orbits(m - level, max_orbits)
            return None if lower is None else ~lower
        if level not in self._levels:
            smaller = self.orbits(level - 1, max_orbits)
            if smaller is None:
                return None
            parent, site = np.nonzero(~smaller)
            grown = smaller[parent]
            grown[np.arange(len(site)), site] = True
            self._levels[level] = self._distinct(grown)
        found = self._levels[level]
        return None if max_orbits is not None and len(found) > max_orbits else found

    def _distinct(self, subsets: NDArray[np.bool_]) -> NDArray[np.bool_]:
        codes = np.unique(self.canonical(subsets))
        return np.asarray((codes[:, None] >> np.arange(len(self.sites))) & 1, dtype=bool)

    def choose(self, level: int, limits: GroupingLimits, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Pick at most `limits.max_per_level` inequivalent subsets (s, m) of `level` sites."""
        m = len(self.sites)
        # A lower bound on the orbits spares growing what would be given up; the group has g elements at most.
        too_many = comb(m, level) > limits.max_enumerated * len(self._images)
        found = None if too_many else self.orbits(level, limits.max_enumerated)
        if found is None:
            picks = rng.permuted(np.tile(np.arange(m) < level, (limits.n_samples, 1)), axis=1)
            found = self._distinct(picks)
        if len(found) > limits.max_per_level:
            found = found[np.sort(rng.choice(len(found), limits.max_per_level, replace=False))]
        return found
