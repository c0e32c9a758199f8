"""What goes into a convex hull, and what comes out of it; records without the machinery of `hull`."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HullEntry:
    """A phase: its composition (amounts by atomic number) and formation energy, eV/atom.

    `method` is the label of the method behind the energy; None stands for that of the hull it is added to.
    """

    id: str
    composition: Mapping[int, int]
    e_form_per_atom: float
    method: str | None = None


@dataclass(frozen=True, kw_only=True)
class Product:
    """A phase that something decomposes to, and its fraction of the atoms; `id` is empty for an element without an entry."""

    id: str
    reduced_formula: str
    fraction: float
