"""What makes two crystals the same.

Two steps.  A *bucket key* of formula, volume and two species-aware sums over neighbour distances is cheap to compute and to index, and is
the same for every description of a crystal: other cell, supercell, order of atoms, mirror image.  Within a bucket and its neighbours
(`keys_to_search`) `same_crystal` decides: pymatgen's StructureMatcher with tight tolerances, and a bound on the largest displacement
of any atom.  That bound is ours, because the matcher alone still calls crystals equal that differ by 0.5 angstrom in every atom; a
prototype label alone would already tell them apart at 0.1 angstrom.  Matching is not transitive, so a group of alike crystals is best
held against its first member.
"""

import itertools
import logging
import math
import warnings

import moyopy
import numpy as np
from moyopy.interface import MoyoAdapter
from numpy.typing import NDArray
from pymatgen.analysis.prototypes import get_protostructure_label_from_moyopy
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure
from vesin import NeighborList

from gnome.crystals.convert import from_structure, to_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import check_crystal

MAX_DISPLACEMENT = 0.15
"""angstrom: no atom may lie further from its counterpart, volumes made equal."""

MAX_VOLUME_CHANGE = 0.05
"""Largest relative difference of the volumes per atom."""

SYMPREC = 0.1
"""angstrom: tolerance of space groups and prototype labels (that of Matbench Discovery's labels)."""

_REACH = 2.5  # of the neighbour sums, in units of the cube root of the volume per atom
_DECAY = 0.9  # width of their Gaussian, same unit
_BIN = np.array([0.15, 0.3, 0.3])  # width of the bins of ln(volume per atom) and of the two sums
_MARGIN = np.array([0.055, 0.10, 0.10])  # how far equal crystals may differ in them
_REDUCTION_SYMPRECS = (0.05, 0.01, 1e-4)


def fingerprint(crystal: Crystal) -> str:
    """Bucket key of a crystal: equal crystals have this key or one of each other's `keys_to_search`.

    Raises InvalidCrystal when the geometric gate would.
    """
    return _key(crystal.reduced_formula, np.floor(_features(crystal) / _BIN))


def keys_to_search(crystal: Crystal) -> frozenset[str]:
    """Return every key under which an equal crystal may stand: its own and the neighbours it lies close to, at most 8."""
    features = _features(crystal)
    low, high = np.floor((features - _MARGIN) / _BIN), np.floor((features + _MARGIN) / _BIN)
    choices = (sorted({below, above}) for below, above in zip(low, high, strict=True))
    return frozenset(_key(crystal.reduced_formula, np.array(bins)) for bins in itertools.product(*choices))


def same_crystal(first: Crystal, second: Crystal) -> bool:
    """Say whether two crystals are the same up to the choice of description and small displacements.

    The primitive cells must match lattices (5 % in lengths, 3 degrees), volumes (`MAX_VOLUME_CHANGE`) and every atom's place
    (`MAX_DISPLACEMENT`).
    """
    if first.reduced_formula != second.reduced_formula:
        return False
    if abs(math.log(first.volume_per_atom / second.volume_per_atom)) > MAX_VOLUME_CHANGE:
        return False
    one, other = primitive_structure(first), primitive_structure(second)
    matcher = StructureMatcher(ltol=0.05, angle_tol=3.0, stol=0.2, primitive_cell=False, attempt_supercell=len(one) != len(other))
    distances = matcher.get_rms_dist(one, other)
    if distances is None:
        return False
    length = math.sqrt(first.volume_per_atom ** (1 / 3) * second.volume_per_atom ** (1 / 3))
    return bool(distances[1] * length <= MAX_DISPLACEMENT)


def primitive_structure(crystal: Crystal) -> Structure:
    """Primitive cell, its atoms at their symmetrised places when a symmetry is found within 0.05 angstrom."""
    structure = to_structure(crystal)
    for symprec in _REDUCTION_SYMPRECS:
        try:
            return MoyoAdapter.get_structure(_dataset(structure, symprec).prim_std_cell)
        except ValueError:  # moyopy found no consistent symmetry at this tolerance
            continue
    return structure


def primitive_crystal(crystal: Crystal) -> Crystal:
    """`primitive_structure` as a crystal."""
    return from_structure(primitive_structure(crystal))


def space_group_number(crystal: Crystal, *, symprec: float = SYMPREC) -> int:
    """International number of the space group, 1 when none is found."""
    try:
        return int(_dataset(to_structure(crystal), symprec).number)
    except ValueError:
        return 1


def prototype_label(crystal: Crystal, *, symprec: float = SYMPREC) -> str:
    """AFLOW-style label with the elements, such as `AB_cF8_225_a_b:Cl-Na`; empty when no symmetry gives one."""
    try:
        primitive = MoyoAdapter.get_structure(_dataset(to_structure(crystal), symprec).prim_std_cell)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "gcd is deprecated", FutureWarning)  # pymatgen calls its own old function
            label = get_protostructure_label_from_moyopy(primitive, raise_errors=True, symprec=symprec)
    except (ValueError, KeyError):
        return ""
    return str(label)


def _dataset(structure: Structure, symprec: float) -> moyopy.MoyoDataset:
    """Symmetry of a structure; raises ValueError when moyopy finds none."""
    return find_symmetry(MoyoAdapter.from_structure(structure), symprec)


def find_symmetry(cell: moyopy.Cell, symprec: float) -> moyopy.MoyoDataset:
    """Symmetry of a cell; raises ValueError when moyopy finds none.

    A supercell makes moyopy log that it left out operations of the primitive cell, which is what is wanted here.
    """
    logger = logging.getLogger("moyo")
    logger.addFilter(_is_no_remark_on_supercells)
    try:
        return moyopy.MoyoDataset(cell, symprec=symprec)
    finally:
        logger.removeFilter(_is_no_remark_on_supercells)


def _is_no_remark_on_supercells(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Omitted")


def _key(formula: str, bins: NDArray[np.float64]) -> str:
    return f"{formula}:{','.join(str(int(value)) for value in bins)}"


def _features(crystal: Crystal) -> NDArray[np.float64]:
    """Logarithm of the volume per atom, and mean neighbour sums over unlike and over like pairs (3,).

    The sums run over q = distance / (volume per atom)^(1/3) of a Gaussian that is brought to zero smoothly at `_REACH`, each pair
    weighted by its two elements so that exchanging elements shows.
    """
    check_crystal(crystal)
    length = crystal.volume_per_atom ** (1 / 3)
    calculator = NeighborList(cutoff=_REACH * length, full_list=True)
    i, j, distance = calculator.compute(points=crystal.cart_coords, box=crystal.lattice, periodic=True, quantities="ijd")
    q = distance / length
    terms = np.exp(-((q / _DECAY) ** 2)) * (1 - (q / _REACH) ** 2) ** 2
    first, second = crystal.atomic_numbers[i.astype(int)], crystal.atomic_numbers[j.astype(int)]
    weighted = terms * _weight(first) * _weight(second)
    unlike, like = (float(weighted[mask].sum()) / crystal.n_atoms for mask in (first != second, first == second))
    return np.array([math.log(crystal.volume_per_atom), unlike, like])


def _weight(atomic_numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Between 0.6 and 1.4, different for neighbours in the periodic table."""
    return np.asarray(0.6 + 0.8 * ((atomic_numbers * 0.6180339887498949) % 1.0), dtype=np.float64)
