"""Candidates from known crystals: whole and symmetry-aware partial substitution.

Source: Merchant et al., Nature 624, 80 (2023), Methods, "Substitution patterns" and SAPS; the probabilities are `pipelines.substitution`'s.
A child keeps its parent's cell shape and fractional coordinates; its volume is the parent's times the ratio of two additive
estimates (`pipelines.volumes`, fitted on the parents).  Compositions that are known are skipped, as GNoME did (novelty by
composition).

Parents take turns in a seeded order, so that a limit starves none; each offers its substitutions in a random order that favours
likely ones.  What one parent offers depends on the seed and the set of parents, never on the order they are given in.
"""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.validity import DEFAULT_GATE, GateSettings, heights, is_valid
from pipelines.candidate import Candidate, Lineage
from pipelines.contacts import CONTACT_REACH, shortest_contacts, smallest_length_factor
from pipelines.oxidation import OXYGEN_BOND, can_be_neutral, guess_oxidation_states, is_salt
from pipelines.substitution import Substitution, SubstitutionSettings, likely_substitutions, load_table
from pipelines.symmetry import DEFAULT_SYMMETRY, MAX_SITES, GroupingLimits, SiteGroupings, SymmetrySettings, site_symmetry
from pipelines.volumes import estimated_volume, fit_atomic_volumes

_LIKENESS_REACH = 1.7
"""Nearest distances that tell crystals apart, in units of the cube root of the volume per atom."""

_VOLUME_SAMPLE = 2000
"""Parents that the atomic volumes are fitted on, at most."""


@dataclass(frozen=True, kw_only=True)
class StructuralSettings:
    """Bounds on parents and children.

    Parents with more than `max_atoms` atoms and children with fewer than `min_elements` or more than `max_elements` are left out:
    an element is its own reference, and ensembles have seen little beyond five.  Children consist of `elements` (atomic numbers)
    alone, where they are given; parents need not.  With `charge_balanced` there is no child of a parent with oxidation states, and no
    oxide or halide, whose charges cannot cancel in any known states; without, its lineage says so.  `sharpness` is the power of the
    probability a substitution is drawn with: 0 draws evenly, large values go strictly by probability.
    """

    max_atoms: int = 40
    min_elements: int = 2
    max_elements: int = 5
    elements: frozenset[int] | None = None
    charge_balanced: bool = True
    sharpness: float = 2.0
    gate: GateSettings = DEFAULT_GATE


@dataclass(frozen=True, kw_only=True)
class IonicSubstitution:
    """Replaces all atoms of one or more elements; a `Generator`.

    `known_formulas` are reduced formulas to skip, beside those of the parents.
    """

    name: ClassVar[str] = "ionic_substitution"
    known_formulas: frozenset[str] = frozenset()
    substitution: SubstitutionSettings = field(default_factory=SubstitutionSettings)
    settings: StructuralSettings = field(default_factory=StructuralSettings)

    def propose(self, parents: Sequence[Crystal], *, limit: int, seed: int, taken: "Taken | None" = None) -> Iterator[Candidate]:
        """Yield at most `limit` candidates, parents taking turns; none that another generator has put into `taken`."""
        table = load_table()
        allowed = replace(self.substitution, elements=_both(self.substitution.elements, self.settings.elements))

        def offers(parent: "_Parent") -> Iterator["_Child"]:
            substitutions = _leaving_only(
                likely_substitutions(parent.crystal.composition, parent.states, table, allowed), parent, self.settings.elements
            )
            offered: set[Hashable] = set()
            for i in _draw_order([s.probability for s in substitutions], self.settings.sharpness, parent.rng):
                chosen = substitutions[i]
                numbers = parent.crystal.atomic_numbers.copy()
                for old, new in chosen.replaced.items():
                    numbers[parent.crystal.atomic_numbers == old] = new
                child = parent.child(numbers, self.name, _describe(chosen), seed)
                # Where sites of two elements are alike (CsCl), swapped substitutions give one crystal.
                if child is not None and child.likeness not in offered:
                    offered.add(child.likeness)
                    yield child

        return _take_turns(parents, offers, self, limit, seed, taken)


@dataclass(frozen=True, kw_only=True)
class PartialSubstitution:
    """Replaces 1 to all atoms of one element on symmetry-unique groupings of its sites (SAPS); a `Generator`.

    `known_formulas` are reduced formulas to skip, beside those of the parents.
    """

    name: ClassVar[str] = "partial_substitution"
    known_formulas: frozenset[str] = frozenset()
    substitution: SubstitutionSettings = field(default_factory=lambda: SubstitutionSettings(max_replaced=1))
    limits: GroupingLimits = field(default_factory=GroupingLimits)
    symmetry: SymmetrySettings = DEFAULT_SYMMETRY
    settings: StructuralSettings = field(default_factory=StructuralSettings)

    def propose(self, parents: Sequence[Crystal], *, limit: int, seed: int, taken: "Taken | None" = None) -> Iterator[Candidate]:
        """Yield at most `limit` candidates, parents taking turns; none that another generator has put into `taken`."""
        table = load_table()
        allowed = replace(self.substitution, elements=_both(self.substitution.elements, self.settings.elements))

        def offers(parent: "_Parent") -> Iterator["_Child"]:
            singles = _leaving_only(
                likely_substitutions(parent.crystal.composition, parent.states, table, allowed), parent, self.settings.elements
            )
            if not singles:
                return
            groupings = self._groupings(parent)
            choices = [(single, groupings[z]) for single in singles for z in single.replaced if z in groupings]
            # Every level of a substitution is equally likely to be drawn, however many groupings it has.
            weights = [single.probability**self.settings.sharpness / found.per_level for single, found in choices]
            starts = np.cumsum([0, *(len(found.sites) for _, found in choices)])
            for i in _draw_order(np.concatenate([*weights, []]), 1.0, parent.rng):
                which = int(np.searchsorted(starts, i, side="right")) - 1
                single, found = choices[which]
                sites = found.sites[i - starts[which]]
                ((_, new),) = single.replaced.items()
                numbers = parent.crystal.atomic_numbers.copy()
                numbers[sites] = new
                child = parent.child(numbers, self.name, {**_describe(single), "sites": sites.tolist()}, seed)
                if child is not None:
                    yield child

        return _take_turns(parents, offers, self, limit, seed, taken)

    def _groupings(self, parent: "_Parent") -> dict[int, "_Groupings"]:
        permutations = site_symmetry(parent.crystal, self.symmetry).permutations
        by_element = {}
        for z, count in parent.crystal.composition.items():
            if count > MAX_SITES:
                continue
            unique = SiteGroupings(np.flatnonzero(parent.crystal.atomic_numbers == z), permutations)
            levels = [unique.choose(level, self.limits, parent.rng) for level in range(1, count + 1)]
            by_element[z] = _Groupings(
                sites=[unique.sites[subset] for level in levels for subset in level],
                per_level=np.concatenate([np.full(len(level), len(level)) for level in levels]),
            )
        return by_element


Taken = dict[Hashable, tuple[str, str]]
"""Which generator has offered a child from which parent, by the child's likeness; shared by the generators of a round."""


@dataclass(frozen=True, kw_only=True)
class _Groupings:
    """Groupings of the sites of one element: the picked sites of each, and how many there are at its level."""

    sites: list[NDArray[np.int64]]
    per_level: NDArray[np.int64]


def _both(first: frozenset[int] | None, second: frozenset[int] | None) -> frozenset[int] | None:
    """Elements that are allowed twice; None allows all."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _leaving_only(
    substitutions: Sequence[Substitution], parent: "_Parent", elements: frozenset[int] | None
) -> list[Substitution]:
    """Those after which only these elements can be left; an element may be replaced everywhere."""
    if elements is None:
        return list(substitutions)
    foreign = parent.crystal.composition.keys() - elements
    return [substitution for substitution in substitutions if foreign <= substitution.replaced.keys()]


def _describe(substitution: Substitution) -> dict[str, Any]:
    return {
        "replaced": {SYMBOLS[old]: SYMBOLS[new] for old, new in sorted(substitution.replaced.items())},
        "probability": float(f"{substitution.probability:.6g}"),
    }


def _draw_order(weights: ArrayLike, sharpness: float, rng: np.random.Generator) -> list[int]:
    """Order in which draws without replacement would come, weights taken to a power (Gumbel keys)."""
    logs = sharpness * np.log(np.asarray(weights, dtype=np.float64))
    order: list[int] = np.argsort(-(logs + rng.gumbel(size=logs.shape)), kind="stable").tolist()
    return order


def _take_turns(
    parents: Sequence[Crystal],
    offers: Callable[["_Parent"], Iterator["_Child"]],
    generator: IonicSubstitution | PartialSubstitution,
    limit: int,
    seed: int,
    taken: Taken | None,
) -> Iterator[Candidate]:
    """Draw one new candidate from each parent in turn until the limit or the last offer."""
    settings = generator.settings
    distinct = {parent.id: parent for parent in parents}
    known = generator.known_formulas | {parent.reduced_formula for parent in parents}
    usable = [distinct[i] for i in sorted(distinct) if distinct[i].n_atoms <= settings.max_atoms]
    # Ids are hashes, so the first of them are an even sample of the parents.
    volumes = fit_atomic_volumes([parent for parent in usable[:_VOLUME_SAMPLE] if is_valid(parent)])
    turns = deque(usable[i] for i in np.random.default_rng(seed).permutation(len(usable)))
    started: dict[str, Iterator[_Child]] = {}
    offered = {} if taken is None else taken
    while turns and limit > 0:
        crystal = turns.popleft()
        if crystal.id not in started:
            if not is_valid(crystal):
                continue
            started[crystal.id] = offers(_Parent(crystal, volumes, settings, seed))
        for child in started[crystal.id]:
            # Isotypic parents offer the same child, and so do two generators: it goes to whoever offers it first.  What one parent
            # offers by one generator all differs.
            own = (generator.name, crystal.id)
            if child.candidate.crystal.reduced_formula in known or offered.setdefault(child.likeness, own) != own:
                continue
            yield child.candidate
            limit -= 1
            turns.append(crystal)
            break


@dataclass(frozen=True, kw_only=True)
class _Child:
    """A candidate and what it shares with the same child of an isotypic parent."""

    candidate: Candidate
    likeness: Hashable


class _Parent:
    """A parent with what every child of it needs."""

    def __init__(self, crystal: Crystal, volumes: NDArray[np.float64], settings: StructuralSettings, seed: int) -> None:
        """Measure the parent once; its random stream depends on the seed and on nothing but itself."""
        self.crystal = crystal
        self.states = guess_oxidation_states(crystal.composition)
        self._is_ionic = len(crystal.composition) > 1 and any(self.states.values())  # by likely states: CuAu is no salt
        self.rng = np.random.default_rng([seed, int(crystal.id, 16)])
        self._settings = settings
        self._volumes = volumes
        self._estimate = estimated_volume(crystal.composition, volumes)
        self._spacing = crystal.volume_per_atom ** (1 / 3)
        self._heights = heights(crystal.lattice)

    @cached_property
    def _contacts(self) -> NDArray[np.float64]:
        return shortest_contacts(self.crystal, reach=max(CONTACT_REACH, _LIKENESS_REACH * self._spacing))

    @cached_property
    def _spacings(self) -> NDArray[np.float64]:
        return np.minimum(self._contacts / self._spacing, _LIKENESS_REACH)

    def child(self, numbers: NDArray[np.int64], generator: str, parameters: dict[str, Any], seed: int) -> _Child | None:
        """Put elements on the parent's sites and rescale; None when the settings or the gate would not admit it."""
        present = set(numbers.tolist())
        if self._settings.elements is not None and not present <= self._settings.elements:
            return None
        factor = round(float(self._volumes[numbers].sum()) / self._estimate, 6)
        gate = self._settings.gate
        length = factor ** (1 / 3)
        if not self._charges_cancel(numbers, length):
            if self._settings.charge_balanced:
                return None
            parameters = {**parameters, "charge_balanced": False}
        fits = (
            self._settings.min_elements <= len(present) <= self._settings.max_elements
            and gate.min_volume_per_atom <= self.crystal.volume_per_atom * factor <= gate.max_volume_per_atom
            and gate.min_height <= self._heights.min() * length
            and self._heights.max() * length <= gate.max_height
            and smallest_length_factor(self._contacts, numbers, gate) <= length
        )
        if not fits:
            return None
        lineage = Lineage(
            generator=generator, parent_id=self.crystal.id, parameters={**parameters, "volume_factor": factor}, seed=seed
        )
        crystal = Crystal(self.crystal.lattice * length, numbers, self.crystal.frac_coords)
        return _Child(candidate=Candidate(crystal=crystal, lineage=lineage), likeness=self._likeness(numbers))

    def _charges_cancel(self, numbers: NDArray[np.int64], length: float) -> bool:
        """Whether a child's charges can cancel, where they have to: in the children of ionic parents, and in all salts."""
        composition = Counter(numbers.tolist())
        if not (self._is_ionic or is_salt(composition)):
            return True
        oxygen = numbers == SYMBOLS.index("O")
        pairs = bool(oxygen.any()) and float(self._contacts[np.ix_(oxygen, oxygen)].min()) * length < OXYGEN_BOND
        return can_be_neutral(composition, oxygen_pairs=pairs)

    def _likeness(self, numbers: NDArray[np.int64]) -> Hashable:
        """Composition, and the mean nearest distance of every pair of elements in units of the atom spacing.

        The same for children of isotypic parents in whatever cells and volumes.
        """
        elements, counts = np.unique(numbers, return_counts=True)
        of_element = numbers[:, None] == elements  # (n, elements)
        nearest = np.stack([self._spacings[:, mask].min(axis=1) for mask in of_element.T], axis=1)
        means = of_element.T.astype(np.float64) @ nearest / counts[:, None]
        composition = tuple((counts // np.gcd.reduce(counts)).tolist())
        return (tuple(elements.tolist()), composition, tuple(np.round(means, 2).ravel().tolist()))
