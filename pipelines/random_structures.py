"""The contract of what makes random structures for a formula, and what the implementations share.

Structures are "sensible" as in AIRSS (Pickard and Needs, J. Phys. Condens. Matter 23, 053201 (2011)): of few formula units, with symmetry,
at a volume between 0.4 and 1.2 times an estimate from radii (Merchant et al., Nature 624, 80 (2023)), and without close contacts.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import GateSettings, is_valid
from pipelines.contacts import shortest_contacts, smallest_length_factor
from pipelines.volumes import estimated_volume, radii_volumes


@dataclass(frozen=True, kw_only=True)
class RandomStructureSettings:
    """What a random structure may look like and what making one may cost.

    Cells hold 1 to `max_formula_units` formula units and at most `max_atoms` atoms.  The volume is drawn evenly between two factors on
    the sum of `volumes` (104,), angstrom^3 by atomic number, from where the gate admits it.  A structure is given up after `attempts`
    draws, and a formula after `max_losses` structures that ran into `time_limit` (seconds) or `memory_limit` (megabytes) or crashed:
    these two limits guard the machine and lie far from what an ordinary structure needs, so that they do not decide results.
    """

    max_formula_units: int = 4
    max_atoms: int = 20
    smallest_factor: float = 0.4
    largest_factor: float = 1.2
    attempts: int = 30
    max_losses: int = 2
    time_limit: float = 30.0
    memory_limit: int = 4096
    gate: GateSettings = field(default_factory=lambda: GateSettings(min_distance_fraction=0.6))
    volumes: NDArray[np.float64] = field(default_factory=radii_volumes, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return {**asdict(self), "volumes": self.volumes.tolist()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuild what `to_dict` gave."""
        return cls(**{**fields, "gate": GateSettings(**fields["gate"]), "volumes": np.array(fields["volumes"])})

    def formula_units(self, composition: Mapping[int, int]) -> range:
        """Numbers of formula units that fit; empty when one is too many."""
        return range(1, min(self.max_formula_units, self.max_atoms // sum(composition.values())) + 1)


@dataclass(frozen=True, kw_only=True)
class RandomStructure:
    """A random crystal and how it was drawn; `index` with the seed and formula names the draw."""

    crystal: Crystal
    index: int
    space_group_number: int
    formula_units: int
    volume_factor: float


@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """What came of a formula: the structures, and in words what went wrong with the others."""

    structures: tuple[RandomStructure, ...]
    failures: tuple[str, ...] = ()


class RandomStructures(Protocol):
    """Makes random structures of a formula.

    The same composition, seed and index give the same structure (as far as the program behind it can be seeded, see
    `is_reproducible`), whatever was asked before.  A hang, crash or lack of memory costs that structure and is reported; the next formula
    is served as if nothing had happened.
    """

    @property
    def name(self) -> str:
        """Short name for lineages."""
        ...

    @property
    def is_reproducible(self) -> bool:
        """Whether the same seed is promised to give the same structures."""
        ...

    def search(self, composition: Mapping[int, int], *, n: int, seed: int) -> RandomSearch:
        """Make at most n structures of a reduced composition."""
        ...

    def close(self) -> None:
        """End whatever processes are kept; searching again starts them anew."""
        ...


def stream(composition: Mapping[int, int], seed: int, index: int) -> np.random.Generator:
    """Random numbers of one structure: they depend on nothing but seed, formula and index."""
    flat = [number for pair in sorted(composition.items()) for number in pair]
    return np.random.default_rng([seed, index, *flat])


def draw_volume(crystal: Crystal, settings: RandomStructureSettings, rng: np.random.Generator) -> tuple[Crystal, float] | None:
    """Rescale a crystal to a random volume at which no two atoms are too close; None when none in the range will do.

    Returns the crystal and its factor on the estimated volume, drawn evenly from what the gate leaves of the range.
    """
    estimate = estimated_volume(crystal.composition, settings.volumes)
    contacts = shortest_contacts(crystal, reach=2.0 * crystal.volume_per_atom ** (1 / 3))
    tightest = smallest_length_factor(contacts, crystal.atomic_numbers, settings.gate) ** 3 * crystal.volume / estimate
    lowest = max(settings.smallest_factor, tightest * (1 + 1e-9))
    if lowest > settings.largest_factor:
        return None
    factor = float(rng.uniform(lowest, settings.largest_factor))
    rescaled = crystal.scaled(factor * estimate / crystal.volume)
    return (rescaled, factor) if is_valid(rescaled, settings.gate) else None
