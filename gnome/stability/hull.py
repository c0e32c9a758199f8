"""Convex hulls: how far a crystal lies above the phases it competes with, and what it would decompose to.

One `ConvexHull` holds the entries of one method; energies of two methods never meet.  The elements stand at 0 eV/atom whatever their
entries say, as in GNoME, because formation energies are taken from them.  Hulls of chemical systems are made when first asked for and
kept until an entry that lowers one of their compositions arrives.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formula import reduced_formula
from gnome.errors import InvalidInput
from gnome.quantities import COMPETING_WITHIN, PLAUSIBLE_E_FORM, STABLE_TOLERANCE
from gnome.stability.entries import HullEntry, Product
from gnome.stability.lower_hull import LowerHull

__all__ = ["ConvexHull", "HullEntry", "Product", "composition_key"]

CompositionKey = tuple[tuple[int, int], ...]
"""A reduced composition: (atomic number, amount) by ascending atomic number, amounts without common divisor."""


@dataclass(frozen=True, eq=False)
class _System:
    """The hull of one chemical system and the entries behind its points; None for an element standing at 0."""

    elements: tuple[int, ...]
    keys: tuple[CompositionKey, ...]
    entries: tuple[HullEntry | None, ...]
    hull: LowerHull
    vertices: frozenset[CompositionKey]


def composition_key(composition: Mapping[int, int]) -> CompositionKey:
    """Reduce a composition to a key that equal ratios share.

    Raises InvalidInput for amounts that are not whole and positive, or atomic numbers of no element.
    """
    amounts = []
    for z, amount in composition.items():
        if int(amount) != amount or amount < 0:
            raise InvalidInput(f"composition {dict(composition)}: the amount {amount} is not a whole number")
        if not 1 <= z < len(SYMBOLS):
            raise InvalidInput(f"composition {dict(composition)}: {z} is not the atomic number of an element")
        if amount:
            amounts.append((int(z), int(amount)))
    if not amounts:
        raise InvalidInput("an empty composition has no place on a hull")
    divisor = math.gcd(*(amount for _, amount in amounts))
    return tuple(sorted((z, amount // divisor) for z, amount in amounts))


class ConvexHull:
    """The hull of one method over all chemical systems that its entries reach.

    Formation energies outside `PLAUSIBLE_E_FORM` and those that are not numbers are refused, because one of them would push every
    other phase off the hull.
    """

    def __init__(self, method: str, entries: Iterable[HullEntry] = ()) -> None:
        """Start from entries of the method with this label."""
        self.method = method
        self._entries: dict[str, HullEntry] = {}
        self._keys: dict[str, CompositionKey] = {}
        self._lowest: dict[frozenset[int], dict[CompositionKey, HullEntry]] = {}
        self._systems: dict[frozenset[int], _System] = {}
        self._without: dict[CompositionKey, LowerHull] = {}
        self._distances: dict[frozenset[int], dict[CompositionKey, float]] = {}
        self.add(entries)

    @property
    def entries(self) -> tuple[HullEntry, ...]:
        """Every entry, in the order of arrival."""
        return tuple(self._entries.values())

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers that occur in the entries."""
        return frozenset().union(*self._lowest) if self._lowest else frozenset()

    def add(self, entries: Iterable[HullEntry]) -> None:
        """Take entries in; all of them or, on an error, none.

        An entry that is there already is passed over.  Raises InvalidInput for an implausible energy, another method's entry, or an id
        that comes again with another composition or energy.
        """
        accepted: dict[str, tuple[HullEntry, CompositionKey]] = {}
        for entry in entries:
            key = self._check(entry)
            known = self._entries.get(entry.id) or accepted.get(entry.id, (None, None))[0]
            if known is None:
                accepted[entry.id] = (replace(entry, method=self.method), key)
            elif composition_key(known.composition) != key or known.e_form_per_atom != entry.e_form_per_atom:
                raise InvalidInput(
                    f"hull entry {entry.id!r} is there with {known.e_form_per_atom} eV/atom and comes again with "
                    f"{entry.e_form_per_atom} eV/atom; an id names one energy"
                )
        lowered: set[frozenset[int]] = set()
        for entry, key in accepted.values():
            self._entries[entry.id] = entry
            self._keys[entry.id] = key
            elements = frozenset(z for z, _ in key)
            of_system = self._lowest.setdefault(elements, {})
            if key not in of_system or entry.e_form_per_atom < of_system[key].e_form_per_atom:
                of_system[key] = entry
                lowered.add(elements)
        self._forget(lowered)

    def energies(self, compositions: Sequence[Mapping[int, int]]) -> NDArray[np.float64]:
        """Hull energies (m,), eV/atom, of many compositions at once."""
        keys = [composition_key(composition) for composition in compositions]
        energies = np.zeros(len(keys))
        for elements, members in _by_system(keys).items():
            system = self._system(elements)
            energies[members] = system.hull.energy(np.array([_fractions(keys[i], system.elements) for i in members]))
        return energies

    def energy(self, composition: Mapping[int, int]) -> float:
        """Hull energy of one composition, eV/atom."""
        return float(self.energies([composition])[0])

    def e_above_hull(self, composition: Mapping[int, int], e_form_per_atom: float) -> float:
        """Distance above the hull, eV/atom; 0 for what lies on it or below."""
        return float(self.e_above_hulls([composition], [e_form_per_atom])[0])

    def e_above_hulls(self, compositions: Sequence[Mapping[int, int]], e_form_per_atom: ArrayLike) -> NDArray[np.float64]:
        """Distances above the hull (m,), eV/atom, of many at once."""
        distance = _finite(e_form_per_atom, len(compositions)) - self.energies(compositions)
        distance[distance < 1e-12] = 0.0
        return distance

    def decomposition_energy(self, composition: Mapping[int, int], e_form_per_atom: float) -> float:
        """Formation energy minus that of the competing phases, eV/atom; negative when it lowers the hull.

        Competing are all entries of another reduced composition, so an entry is never compared with itself.
        """
        return float(self.decomposition_energies([composition], [e_form_per_atom])[0])

    def decomposition_energies(
        self, compositions: Sequence[Mapping[int, int]], e_form_per_atom: ArrayLike
    ) -> NDArray[np.float64]:
        """Decomposition energies (m,), eV/atom, of many at once."""
        e_form = _finite(e_form_per_atom, len(compositions))
        competing = self.energies(compositions)
        for i, composition in enumerate(compositions):
            key = composition_key(composition)
            system = self._system(frozenset(z for z, _ in key))
            if len(key) > 1 and key in system.vertices:
                hull = self._hull_without(key, system)
                competing[i] = hull.energy(_fractions(key, system.elements)[None, :])[0]
        return np.asarray(e_form - competing)

    def decomposition(self, composition: Mapping[int, int], *, competing_only: bool = False) -> tuple[Product, ...]:
        """Find the phases on the hull that this composition splits into, the largest first.

        Fractions of the atoms sum to 1 and give back composition and hull energy to 1e-9.  With `competing_only` the entries of the
        same reduced composition are left out, as in `decomposition_energy`.
        """
        key = composition_key(composition)
        system = self._system(frozenset(z for z, _ in key))
        points: Sequence[int] = range(len(system.keys))
        hull = system.hull
        if competing_only and len(key) > 1 and key in system.vertices:
            hull = self._hull_without(key, system)
            points = [i for i, other in enumerate(system.keys) if other != key]
        products = []
        for i, fraction in hull.decompose(_fractions(key, system.elements)):
            entry = system.entries[points[i]]
            formula = reduced_formula(dict(system.keys[points[i]]))
            products.append(Product(id=entry.id if entry else "", reduced_formula=formula, fraction=fraction))
        return tuple(sorted(products, key=lambda product: (-product.fraction, product.reduced_formula)))

    def stable(self, tolerance: float = STABLE_TOLERANCE) -> tuple[HullEntry, ...]:
        """Entries at most `tolerance` eV/atom above the hull."""
        entries = self.entries
        if not entries:
            return ()
        distances = self.e_above_hulls([entry.composition for entry in entries], [entry.e_form_per_atom for entry in entries])
        return tuple(entry for entry, distance in zip(entries, distances, strict=True) if distance <= tolerance)

    def n_competing(self, composition: Mapping[int, int], within: float = COMPETING_WITHIN) -> int:
        """Count the compounds of a composition's system and its subsystems at most `within` eV/atom above the hull of all others.

        A reduced composition counts once, by its lowest entry; the composition itself and the elements do not count.  None means
        that a verdict would rest on the elements alone.  Raises InvalidInput for a `within` that is negative or not a number.
        """
        if not within >= 0:
            raise InvalidInput(f"compounds within {within} eV/atom of the hull: expected a number of at least 0")
        own = composition_key(composition)
        elements = tuple(sorted(z for z, _ in own))
        parts = [frozenset(part) for n in range(2, len(elements) + 1) for part in itertools.combinations(elements, n)]
        system = self._system(frozenset(elements))
        if len(own) > 1 and own in system.vertices:  # lying on the hull itself, it must not push its competitors away
            others = {key: entry for part in parts for key, entry in self._lowest.get(part, {}).items() if key != own}
            fractions = np.array([_fractions(key, elements) for key in others]).reshape(-1, len(elements))
            above = np.array([entry.e_form_per_atom for entry in others.values()]) - self._hull_without(own, system).energy(
                fractions
            )
            return int((above <= within + 1e-12).sum())
        return sum(key != own and distance <= within for part in parts for key, distance in self._distances_of(part).items())

    def _distances_of(self, elements: frozenset[int]) -> dict[CompositionKey, float]:
        """Distances above the hull, eV/atom, of the lowest entries that hold all of these elements and no other."""
        if elements not in self._lowest:
            return {}
        if elements not in self._distances:
            lowest = self._lowest[elements]
            distances = self.e_above_hulls([dict(key) for key in lowest], [entry.e_form_per_atom for entry in lowest.values()])
            self._distances[elements] = dict(zip(lowest, distances.tolist(), strict=True))
        return self._distances[elements]

    def _check(self, entry: HullEntry) -> CompositionKey:
        if entry.method is not None and entry.method != self.method:
            raise InvalidInput(f"hull entry {entry.id!r} belongs to {entry.method!r}, this is the hull of {self.method!r}")
        low, high = PLAUSIBLE_E_FORM
        if not low <= entry.e_form_per_atom <= high:  # also refuses NaN
            raise InvalidInput(
                f"hull entry {entry.id!r} has a formation energy of {entry.e_form_per_atom} eV/atom, expected {low:g} to {high:g}"
            )
        return composition_key(entry.composition)

    def _forget(self, lowered: set[frozenset[int]]) -> None:
        """Drop the hulls of every system that holds one of these."""
        self._systems = {
            elements: system for elements, system in self._systems.items() if not any(low <= elements for low in lowered)
        }
        self._without = {
            key: hull for key, hull in self._without.items() if not any(low <= {z for z, _ in key} for low in lowered)
        }
        self._distances = {
            elements: known for elements, known in self._distances.items() if not any(low <= elements for low in lowered)
        }

    def _system(self, elements: frozenset[int]) -> _System:
        if elements in self._systems:
            return self._systems[elements]
        ordered = tuple(sorted(elements))
        keys: list[CompositionKey] = [((z, 1),) for z in ordered]
        entries: list[HullEntry | None] = [self._lowest.get(frozenset({z}), {}).get(((z, 1),)) for z in ordered]
        for size in range(2, len(ordered) + 1):
            for part in itertools.combinations(ordered, size):
                for key, entry in self._lowest.get(frozenset(part), {}).items():
                    if entry.e_form_per_atom < 0:
                        keys.append(key)
                        entries.append(entry)
        fractions = np.array([_fractions(key, ordered) for key in keys])
        energies = np.array(
            [0.0 if len(key) == 1 or entry is None else entry.e_form_per_atom for key, entry in zip(keys, entries, strict=True)]
        )
        hull = LowerHull.build(fractions, energies)
        vertices = frozenset(keys[i] for i in hull.vertices())
        self._systems[elements] = _System(ordered, tuple(keys), tuple(entries), hull, vertices)
        return self._systems[elements]

    def _hull_without(self, key: CompositionKey, system: _System) -> LowerHull:
        """Make the hull of the composition's own system from the entries of other compositions."""
        if key not in self._without:
            others = np.array([other != key for other in system.keys])
            self._without[key] = LowerHull.build(system.hull.fractions[others], system.hull.energies[others])
        return self._without[key]


def _fractions(key: CompositionKey, elements: tuple[int, ...]) -> NDArray[np.float64]:
    amounts = dict(key)
    vector = np.array([amounts.get(z, 0) for z in elements], dtype=np.float64)
    return np.asarray(vector / vector.sum())


def _by_system(keys: Sequence[CompositionKey]) -> dict[frozenset[int], list[int]]:
    systems: dict[frozenset[int], list[int]] = {}
    for i, key in enumerate(keys):
        systems.setdefault(frozenset(z for z, _ in key), []).append(i)
    return systems


def _finite(values: ArrayLike, expected: int) -> NDArray[np.float64]:
    energies = np.array(values, dtype=np.float64)
    if energies.shape != (expected,):
        raise InvalidInput(f"{expected} compositions come with energies of shape {energies.shape}")
    if not np.isfinite(energies).all():
        first = int(np.flatnonzero(~np.isfinite(energies))[0])
        raise InvalidInput(f"formation energy number {first} is {energies[first]}, expected a finite number of eV/atom")
    return energies
