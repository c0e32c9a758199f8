"""Structure types of the textbook table: space group, axes and occupied positions, into which elements and lattice constants go.

The elements of a formula fill the positions in the order they are written, so a row says `CaF2` under `fluorite` and `OLi2` under the
same type for the antifluorite.  Origin choice 1 throughout.  `x` in a position is the type's free coordinate, which a row may override.
"""

import re
from dataclasses import dataclass
from functools import cache

from moyopy import MoyoDataset
from moyopy.interface import MoyoAdapter
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.symmetry.groups import SpaceGroup

Position = tuple[float | str, float | str, float | str]


@dataclass(frozen=True)
class StructureType:
    """Space group symbol, crystal family of the axes, positions, the usual value of the free coordinate, and beta in degrees."""

    space_group: str
    family: str
    positions: tuple[Position, ...]
    x: float = 0.0
    beta: float = 90.0


_CUBIC, _TETRAGONAL, _HEXAGONAL, _ORTHORHOMBIC = "cubic", "tetragonal", "hexagonal", "orthorhombic"
_MONOCLINIC = "monoclinic"
_Q, _T, _S = 0.25, 1 / 3, 2 / 3

STRUCTURE_TYPES: dict[str, StructureType] = {
    # elements
    "fcc": StructureType("Fm-3m", _CUBIC, ((0, 0, 0),)),
    "bcc": StructureType("Im-3m", _CUBIC, ((0, 0, 0),)),
    "hcp": StructureType("P6_3/mmc", _HEXAGONAL, ((_T, _S, _Q),)),
    "diamond": StructureType("Fd-3m", _CUBIC, ((0, 0, 0),)),
    "A7": StructureType("R-3m", _HEXAGONAL, ((0, 0, "x"),), 0.23),
    "A8": StructureType("P3_121", _HEXAGONAL, (("x", 0, _T),), 0.24),
    "dhcp": StructureType("P6_3/mmc", _HEXAGONAL, ((0, 0, 0), (_T, _S, _Q))),
    "alpha-N2": StructureType("Pa-3", _CUBIC, (("x", "x", "x"),), 0.055),
    "alpha-O2": StructureType("C2/m", _MONOCLINIC, ((0.103, 0, 0.161),), beta=132.5),
    "A14 Cl": StructureType("Cmce", _ORTHORHOMBIC, ((0, 0.130, 0.100),)),
    "A14 Br": StructureType("Cmce", _ORTHORHOMBIC, ((0, 0.135, 0.110),)),
    "A14 I": StructureType("Cmce", _ORTHORHOMBIC, ((0, 0.154, 0.117),)),
    "alpha-Mn": StructureType(
        "I-43m", _CUBIC, ((0, 0, 0), (0.317, 0.317, 0.317), (0.357, 0.357, 0.034), (0.089, 0.089, 0.282))
    ),
    "alpha-S": StructureType(
        "Fddd",
        _ORTHORHOMBIC,
        ((0.9804, 0.0776, 0.0766), (0.9094, 0.1551, 0.2013), (0.8319, 0.1045, 0.1290), (0.9112, 0.0323, 0.2540)),
    ),
    # AB
    "rocksalt": StructureType("Fm-3m", _CUBIC, ((0, 0, 0), (0.5, 0.5, 0.5))),
    "CsCl": StructureType("Pm-3m", _CUBIC, ((0, 0, 0), (0.5, 0.5, 0.5))),
    "zincblende": StructureType("F-43m", _CUBIC, ((0, 0, 0), (_Q, _Q, _Q))),
    "wurtzite": StructureType("P6_3mc", _HEXAGONAL, ((_T, _S, 0), (_T, _S, "x")), 0.375),
    "NiAs": StructureType("P6_3/mmc", _HEXAGONAL, ((0, 0, 0), (_T, _S, _Q))),
    "L1_0": StructureType("P4/mmm", _TETRAGONAL, ((0, 0, 0), (0.5, 0.5, 0.5))),
    "B32": StructureType("Fd-3m", _CUBIC, ((0, 0, 0), (0.5, 0.5, 0.5))),
    "B10": StructureType("P4/nmm", _TETRAGONAL, ((0, 0, 0), (0, 0.5, "x")), 0.26),
    # AB2
    "fluorite": StructureType("Fm-3m", _CUBIC, ((0, 0, 0), (_Q, _Q, _Q))),
    "rutile": StructureType("P4_2/mnm", _TETRAGONAL, ((0, 0, 0), ("x", "x", 0)), 0.305),
    "pyrite": StructureType("Pa-3", _CUBIC, ((0, 0, 0), ("x", "x", "x")), 0.385),
    "CdI2": StructureType("P-3m1", _HEXAGONAL, ((0, 0, 0), (_T, _S, "x")), 0.25),
    "MoS2": StructureType("P6_3/mmc", _HEXAGONAL, ((_T, _S, _Q), (_T, _S, "x")), 0.621),
    "AlB2": StructureType("P6/mmm", _HEXAGONAL, ((0, 0, 0), (_T, _S, 0.5))),
    "C15": StructureType("Fd-3m", _CUBIC, ((0, 0, 0), (0.625, 0.625, 0.625))),
    "C14": StructureType("P6_3/mmc", _HEXAGONAL, ((_T, _S, 0.062), (0, 0, 0), ("x", "2x", _Q)), 0.83),
    "C11b": StructureType("I4/mmm", _TETRAGONAL, ((0, 0, 0), (0, 0, "x")), 0.333),
    "cuprite": StructureType("Pn-3m", _CUBIC, ((0, 0, 0), (_Q, _Q, _Q))),
    # AB3, A2B3, AB5, AB6
    "L1_2": StructureType("Pm-3m", _CUBIC, ((0.5, 0.5, 0), (0, 0, 0))),
    "A15": StructureType("Pm-3n", _CUBIC, ((_Q, 0, 0.5), (0, 0, 0))),
    "D0_3": StructureType("Fm-3m", _CUBIC, ((_Q, _Q, _Q), (0.5, 0.5, 0.5), (0, 0, 0))),
    "D0_19": StructureType("P6_3/mmc", _HEXAGONAL, (("x", "2x", _Q), (_T, _S, _Q)), 0.833),
    "D0_22": StructureType("I4/mmm", _TETRAGONAL, ((0, 0.5, _Q), (0, 0, 0.5), (0, 0, 0))),
    "ReO3": StructureType("Pm-3m", _CUBIC, ((0, 0, 0), (0.5, 0, 0))),
    "corundum": StructureType("R-3c", _HEXAGONAL, ((0, 0, 0.352), ("x", 0, _Q)), 0.306),
    "CaCu5": StructureType("P6/mmm", _HEXAGONAL, ((0, 0, 0), (_T, _S, 0), (0.5, 0, 0.5))),
    "CaB6": StructureType("Pm-3m", _CUBIC, ((0, 0, 0), ("x", 0.5, 0.5)), 0.2),
    "A-La2O3": StructureType("P-3m1", _HEXAGONAL, ((_T, _S, 0.245), (0, 0, 0), (_T, _S, 0.645))),
    "bixbyite": StructureType("Ia-3", _CUBIC, ((_Q, _Q, _Q), (0.968, 0, _Q), (0.391, 0.152, 0.380))),
    "tysonite": StructureType(
        "P-3c1", _HEXAGONAL, ((0.660, 0, _Q), (0.366, 0.054, 0.081), (_T, _S, 0.187), (0, 0, _Q))
    ),
    "YF3": StructureType("Pnma", _ORTHORHOMBIC, ((0.367, _Q, 0.058), (0.165, 0.060, 0.363), (0.528, _Q, 0.601))),
    "UCl3": StructureType("P6_3/m", _HEXAGONAL, ((_T, _S, _Q), (0.387, 0.302, _Q))),
    # ternaries
    "zircon": StructureType("I4_1/amd", _TETRAGONAL, ((0, 0, 0), (0, 0, 0.5), (0, 0.20, 0.34))),
    "perovskite": StructureType("Pm-3m", _CUBIC, ((0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0))),
    "half-Heusler": StructureType("F-43m", _CUBIC, ((_Q, _Q, _Q), (0, 0, 0), (0.5, 0.5, 0.5))),
    "Heusler": StructureType("Fm-3m", _CUBIC, ((_Q, _Q, _Q), (0, 0, 0), (0.5, 0.5, 0.5))),
    "chalcopyrite": StructureType("I-42d", _TETRAGONAL, ((0, 0, 0), (0, 0, 0.5), ("x", _Q, 0.125)), 0.25),
    "spinel": StructureType("Fd-3m", _CUBIC, ((0, 0, 0), (0.625, 0.625, 0.625), ("x", "x", "x")), 0.3875),
    "ilmenite": StructureType("R-3", _HEXAGONAL, ((0, 0, 0.355), (0, 0, 0.146), (0.317, 0.023, 0.245))),
    "NaFeO2": StructureType("R-3m", _HEXAGONAL, ((0, 0, 0.5), (0, 0, 0), (0, 0, "x")), 0.265),
    "delafossite": StructureType("R-3m", _HEXAGONAL, ((0, 0, 0), (0, 0, 0.5), (0, 0, "x")), 0.109),
    "PbFCl": StructureType("P4/nmm", _TETRAGONAL, ((0, 0.5, 0.19), (0, 0, 0), (0, 0.5, "x")), 0.65),
    "ThCr2Si2": StructureType("I4/mmm", _TETRAGONAL, ((0, 0, 0), (0, 0.5, _Q), (0, 0, "x")), 0.365),
    "K2NiF4": StructureType("I4/mmm", _TETRAGONAL, ((0, 0, 0.355), (0, 0, 0), (0, 0.5, 0), (0, 0, "x")), 0.155),
    "K2PtCl6": StructureType("Fm-3m", _CUBIC, ((_Q, _Q, _Q), (0, 0, 0), ("x", 0, 0)), 0.24),
    "elpasolite": StructureType("Fm-3m", _CUBIC, ((_Q, _Q, _Q), (0.5, 0.5, 0.5), (0, 0, 0), ("x", 0, 0)), 0.25),
    "gamma-LiFeO2": StructureType("I4_1/amd", _TETRAGONAL, ((0, 0, 0.5), (0, 0, 0), (0, 0, "x")), 0.24),
    "brucite": StructureType("P-3m1", _HEXAGONAL, ((0, 0, 0), (_T, _S, 0.22), (_T, _S, 0.42))),
    "aragonite": StructureType(
        "Pnma", _ORTHORHOMBIC, ((0.2403, _Q, 0.585), (0.0862, _Q, 0.2378), (0.0962, _Q, 0.0775), (0.0862, 0.4736, 0.3190))
    ),
    "olivine": StructureType(
        "Pnma",
        _ORTHORHOMBIC,
        ((0, 0, 0), (0.282, _Q, 0.975), (0.095, _Q, 0.418), (0.097, _Q, 0.743), (0.457, _Q, 0.206), (0.166, 0.047, 0.285)),
    ),
    "beta-Li3PO4": StructureType(
        "Pmn2_1",
        _ORTHORHOMBIC,
        ((0.248, 0.328, 0.986), (0, 0.157, 0.489), (0, 0.824, 0), (0.208, 0.687, 0.896), (0, 0.106, 0.902), (0, 0.814, 0.319)),
    ),
    "beta-K2SO4": StructureType(
        "Pnma",
        _ORTHORHOMBIC,
        ((0.674, _Q, 0.411), (0.989, _Q, 0.704), (0.233, _Q, 0.420), (0.038, _Q, 0.417), (0.297, _Q, 0.558), (0.301, 0.041, 0.352)),
    ),
    "berlinite": StructureType(
        "P3_121", _HEXAGONAL, ((0.466, 0, _T), (0.467, 0, 5 / 6), (0.416, 0.292, 0.398), (0.416, 0.258, 0.884))
    ),
    "scheelite": StructureType("I4_1/a", _TETRAGONAL, ((0, 0, 0.5), (0, 0, 0), (0.241, 0.151, 0.086))),
    "wolframite": StructureType(
        "P2/c", _MONOCLINIC, ((0.5, 0.68, _Q), (0, 0.18, _Q), (0.215, 0.10, 0.565), (0.25, 0.375, 0.11)), beta=90.5
    ),
    "Li2SnO3": StructureType(
        "C2/m",
        _MONOCLINIC,
        ((0, 0.5, 0), (0, 0, 0.5), (0, 0.661, 0.5), (0, 0.167, 0), (0.219, 0, 0.227), (0.254, 0.321, 0.223)),
        beta=109.3,
    ),
    # a few with molecules, chains and layers
    "SnF4": StructureType("I4/mmm", _TETRAGONAL, ((0, 0, 0), (0, 0.5, 0), (0, 0, 0.237))),
    "alpha-UF5": StructureType("I4/m", _TETRAGONAL, ((0, 0, 0), (0, 0, 0.5), (0.315, 0.113, 0))),
    "XeF2": StructureType("I4/mmm", _TETRAGONAL, ((0, 0, 0), (0, 0, "x")), 0.284),
    "Na2O2": StructureType("P-62m", _HEXAGONAL, ((0.297, 0, 0), (0.632, 0, 0.5), (0, 0, 0.168), (_T, _S, 0.332))),
    "Li2O2": StructureType("P6_3/mmc", _HEXAGONAL, ((0, 0, 0), (_T, _S, _Q), (_T, _S, 0.6486))),
    "B-Nb2O5": StructureType(
        "C2/c", _MONOCLINIC, ((0.141, 0.244, 0.247), (0, 0.109, _Q), (0.295, 0.377, 0.419), (0.105, 0.425, 0.002)), beta=105.0
    ),
    "o-P2O5": StructureType(  # positions fitted to the published bond lengths, 1.58 and 1.445 angstrom
        "Fdd2", _ORTHORHOMBIC, ((0.6733, 0.8771, 0.2846), (0, 0, 0), (0.1031, 0.7358, 0.7804), (0.9432, 0.2424, 0.3515))
    ),
    "Ba(NO3)2": StructureType("Pa-3", _CUBIC, ((0, 0, 0), (0.351, 0.351, 0.351), (0.287, 0.286, 0.477))),
}  # fmt: skip

_SPLIT_SITES = {
    "C14": (0, 1, 1),
    "CaCu5": (0, 1, 1),
    "D0_3": (0, 0, 1),
    "D0_22": (0, 0, 1),
    "K2NiF4": (0, 1, 2, 2),
    "A-La2O3": (0, 1, 1),
    "bixbyite": (0, 0, 1),
    "tysonite": (0, 1, 1, 1),
    "YF3": (0, 1, 1),
    "aragonite": (0, 1, 2, 2),
    "olivine": (0, 1, 2, 3, 3, 3),
    "beta-Li3PO4": (0, 0, 1, 2, 2, 2),
    "beta-K2SO4": (0, 0, 1, 2, 2, 2),
    "berlinite": (0, 1, 2, 2),
    "wolframite": (0, 1, 2, 2),
    "Li2SnO3": (0, 0, 0, 1, 2, 2),
    "SnF4": (0, 1, 1),
    "alpha-UF5": (0, 1, 1),
    "Na2O2": (0, 0, 1, 1),
    "Li2O2": (0, 0, 1),
    "B-Nb2O5": (0, 1, 1, 1),
    "o-P2O5": (0, 1, 1, 1),
} | dict.fromkeys(("dhcp", "alpha-Mn", "alpha-S"), (0, 0, 0, 0))
"""Types in which one element fills several positions: which element of the formula goes where."""


def build(formula: str, type_name: str, a: float, b: float = 0.0, c: float = 0.0, x: float | None = None) -> Structure:
    """Primitive cell of a compound; `a`, `b`, `c` angstrom, of the conventional axes.

    Raises ValueError when the structure's composition is not what the formula says.
    """
    kind = STRUCTURE_TYPES[type_name]
    elements = re.findall(r"([A-Z][a-z]?)\d*", formula)
    free = kind.x if x is None else x
    sites = _SPLIT_SITES.get(type_name, tuple(range(len(kind.positions))))
    species = [elements[i] for i in sites[: len(kind.positions)]]
    coords = [[_value(value, free) for value in position] for position in kind.positions]
    _space_group(kind.space_group)
    structure = Structure.from_spacegroup(kind.space_group, _lattice(kind, a, b, c), species, coords)
    if not structure.composition.reduced_composition.almost_equals(Composition(formula).reduced_composition):
        raise ValueError(f"{formula} as {type_name} gives {structure.composition.reduced_formula}")
    return MoyoAdapter.get_structure(MoyoDataset(MoyoAdapter.from_structure(structure)).prim_std_cell)


@cache
def _space_group(symbol: str) -> SpaceGroup:
    """Keep the group alive: pymatgen takes a second to make one and remembers it only while somebody holds it."""
    return SpaceGroup(symbol)


def _value(value: float | str, free: float) -> float:
    if value == "x":
        return free
    return 2 * free if value == "2x" else float(value)


def _lattice(kind: StructureType, a: float, b: float, c: float) -> Lattice:
    family = kind.family
    if family == _MONOCLINIC:
        return Lattice.monoclinic(a, b, c, kind.beta)
    if family == _CUBIC:
        return Lattice.cubic(a)
    if family == _TETRAGONAL:
        return Lattice.tetragonal(a, c)
    if family == _HEXAGONAL:
        return Lattice.hexagonal(a, c)
    return Lattice.orthorhombic(a, b, c)
