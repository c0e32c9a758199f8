"""The lower convex hull of one chemical system, as the set of planes that bound it from below.

Entries are points (atomic fractions, formation energy).  Qhull gives the facets of their convex hull; the lower ones are planes
e = mu . x, with mu the chemical potentials of the elements.  The hull is convex, so the hull energy of any composition is the highest
of these planes there, which is one matrix product for thousands of compositions.

Two checks make the planes trustworthy, because Qhull merges facets where points nearly coincide: no plane may lie above an entry, and
the facets' projections must fill the composition simplex (their determinants sum to 1).  Where they fail, and for systems of more than
`MAX_QHULL_ELEMENTS` elements, a linear program answers instead, composition by composition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.spatial import ConvexHull as QuickHull
from scipy.spatial import QhullError

MAX_QHULL_ELEMENTS = 5
_ABOVE_ENTRY = 1e-10  # eV/atom that a plane may rise above an entry by rounding
_UNFILLED = 1e-9  # part of the composition simplex that facets may miss by rounding
_NEGLIGIBLE_FRACTION = 1e-10
_MAX_PRODUCT = 4_000_000  # numbers in one block of compositions x planes: 32 MB

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LowerHull:
    """Lower hull of points that include every element of the system at 0 eV/atom.

    `fractions` (n, d) and `energies` (n,) are the points; `facets` (f, d) index them and `potentials` (f, d) are the planes; both are
    None where the linear program answers.
    """

    fractions: Floats
    energies: Floats
    facets: NDArray[np.int64] | None
    potentials: Floats | None

    @classmethod
    def build(cls, fractions: Floats, energies: Floats, *, linear_program: bool = False) -> "LowerHull":
        """Find the planes, or leave the system to the linear program."""
        n_elements = fractions.shape[1]
        if not (energies < 0).any():
            elements = np.flatnonzero(fractions.max(axis=1) == 1.0)
            return cls(fractions, energies, elements[None, :], np.zeros((1, n_elements)))
        if linear_program or n_elements > MAX_QHULL_ELEMENTS:
            return cls(fractions, energies, None, None)
        facets = _lower_facets(fractions, energies)
        if facets is None:
            return cls(fractions, energies, None, None)
        potentials = np.asarray(np.linalg.solve(fractions[facets], energies[facets][..., None])[..., 0], dtype=np.float64)
        overshoot = max(
            float((fractions[block] @ potentials.T - energies[block, None]).max())
            for block in _blocks(len(energies), len(facets))
        )
        if overshoot > _ABOVE_ENTRY:
            return cls(fractions, energies, None, None)
        return cls(fractions, energies, facets, potentials)

    def energy(self, compositions: Floats) -> Floats:
        """Hull energies (m,), eV/atom, of atomic fractions (m, d)."""
        if self.potentials is None:
            return np.array([self._solve(x)[1] for x in compositions])
        energies = np.empty(len(compositions))
        for block in _blocks(len(compositions), len(self.potentials)):
            energies[block] = (compositions[block] @ self.potentials.T).max(axis=1)
        return energies

    def decompose(self, composition: Floats) -> list[tuple[int, float]]:
        """Points that atomic fractions (d,) split into, each with its fraction of the atoms; fractions sum to 1."""
        if self.facets is None or self.potentials is None:
            return self._solve(composition)[0]
        facet = self.facets[int((self.potentials @ composition).argmax())]
        weights = np.linalg.solve(self.fractions[facet].T, composition)
        if weights.min() < -_NEGLIGIBLE_FRACTION:
            return self._solve(composition)[0]
        return _tidy(facet, weights)

    def vertices(self) -> frozenset[int]:
        """Points that hold the hull up: taking away any other changes nothing.  All points where there are no facets."""
        if self.facets is None:
            return frozenset(range(len(self.energies)))
        return frozenset(np.unique(self.facets).tolist())

    def _solve(self, composition: Floats) -> tuple[list[tuple[int, float]], float]:
        """Minimise the energy of a mixture of points with this composition."""
        answer = linprog(
            self.energies,
            A_eq=self.fractions.T,
            b_eq=composition,
            bounds=(0, None),
            method="highs-ds",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if not answer.success:  # the elements alone are always a solution
            raise RuntimeError(f"linear program for {composition.tolist()} ended with: {answer.message}")
        used = np.flatnonzero(answer.x > _NEGLIGIBLE_FRACTION)
        # The program meets the composition to its tolerance only; the points it chose meet it exactly.
        weights = np.asarray(np.linalg.lstsq(self.fractions[used].T, composition, rcond=None)[0], dtype=np.float64)
        products = _tidy(used, weights)
        return products, float(sum(self.energies[i] * weight for i, weight in products))


def _lower_facets(fractions: Floats, energies: Floats) -> NDArray[np.int64] | None:
    """Facets (f, d) of the lower hull as indices of points; None when Qhull's answer cannot be trusted."""
    points = np.column_stack([fractions[:, 1:], energies])
    try:
        hull = QuickHull(points)
    except QhullError:
        return None
    facets = hull.simplices[hull.equations[:, -2] < 0].astype(np.int64)
    volumes = np.abs(np.linalg.det(fractions[facets]))
    solid = volumes > 1e-12
    if abs(volumes[solid].sum() - 1.0) > _UNFILLED:
        return None
    return np.asarray(facets[solid])


def _tidy(points: Sequence[int] | NDArray[np.int64], weights: Floats) -> list[tuple[int, float]]:
    kept = weights > _NEGLIGIBLE_FRACTION
    total = float(weights[kept].sum())
    return [(int(i), float(weight) / total) for i, weight, keep in zip(points, weights, kept, strict=True) if keep]


def _blocks(n_rows: int, n_columns: int) -> list[slice]:
    size = max(1, _MAX_PRODUCT // max(n_columns, 1))
    return [slice(start, start + size) for start in range(0, n_rows, size)]
