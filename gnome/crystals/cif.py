"""Reading CIF, the format in which a few kilobytes can ask for hours.

A CIF lists sites and symmetry operations, and the reader multiplies them: 60 sites and 400 operations make 24,000 atoms out of 9 kB.  So
sites and operations are counted before anything is expanded, and large products are refused.

What is read goes one way: `cif_syntax` (blocks, quotes, loops), `cif_sites` (what atoms are listed), `cif_operations` or, where none are
listed, `cif_group` (the symmetry), `cif_orbits` (all atoms of the cell), and the checks of `cif_contents` and this file on what came out.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Lattice
from scipy.spatial import cKDTree

from gnome.crystals.cif_contents import Symmetry, check_contents, check_formula, stated_formulas
from gnome.crystals.cif_group import group_number, named_operations, settings_named
from gnome.crystals.cif_operations import Operations, read_operations, triplets
from gnome.crystals.cif_orbits import MOST_APART, expand
from gnome.crystals.cif_sites import count_sites, read_sites
from gnome.crystals.cif_syntax import UNSAID, CifTable, number, read_table, split_blocks
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.errors import InvalidCrystal

__all__ = ["CifLimits", "parse_block", "read_block", "split_blocks"]

_OPERATIONS: Final = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")
_MOST_OPERATIONS: Final = 192  # of any space group, when only its name is given


@dataclass(frozen=True, kw_only=True)
class CifLimits:
    """How much a CIF block may ask for.

    `max_product` of sites and operations, which takes a third of a second; `max_operations`: eight times what a space group has in
    its usual cell, for those of larger ones.
    """

    max_product: int = 60_000
    max_operations: int = 1_536


def read_block(text: str, limits: CifLimits) -> Crystal:
    """Read one data block.

    Raises InvalidCrystal with reason `malformed`, `too_large`, `formula_mismatch`, `disordered`, `overlap`, `isotope` or
    `unsupported_element`.
    """
    table = read_table(text)
    product = _product(table)
    if product > limits.max_product:
        message = f"sites times symmetry operations are {product}, the limit is {limits.max_product}"
        raise InvalidCrystal("too_large", message)
    if (n_operations := len(_listed_operations(table))) > limits.max_operations:
        raise InvalidCrystal("too_large", f"{n_operations} symmetry operations, the limit is {limits.max_operations}")
    return _crystal(table)


def parse_block(text: str) -> Crystal:
    """Read one data block, whatever it takes."""
    return _crystal(read_table(text))


def _crystal(table: CifTable) -> Crystal:
    _refuse_other_symmetry(table)
    lattice = _lattice(table)
    metric = lattice @ lattice.T
    formulas, formula = stated_formulas(table)
    is_right = all(value == _RIGHT_ANGLE for value in _cell(table)[1])
    symbols = frozenset(SYMBOLS[z] for amounts in formulas for z in amounts)
    sites = read_sites(table, symbols, np.sqrt(np.diag(metric)) if is_right else None)
    operations = _operations(table, metric)
    numbers, coords, orbits = expand(sites, operations, lattice)
    crystal = Crystal(lattice, numbers, coords)
    check_formula(crystal, formulas, formula)
    is_listed = bool(_listed_operations(table))
    is_named = is_listed and _check_named_group(table, crystal, operations)
    check_contents(table, crystal, Symmetry(len(operations), orbits, is_listed=is_listed, is_sure=is_named), formulas)
    return crystal


_MODULATED: Final = ("_space_group_symop_ssg_", "_cell_wave_vector_", "_space_group_ssg_")
_MAGNETIC: Final = ("_space_group_symop_magn_", "_space_group_magn_")


def _refuse_other_symmetry(table: CifTable) -> None:
    """Refuse what three dimensions and a space group do not describe."""
    dimension = number(table.one("_cell_modulation_dimension"))
    if dimension or any(name.startswith(_MODULATED) for name in table.columns):
        raise InvalidCrystal("malformed", "a modulated structure has no unit cell; give an approximant")
    if any(name.startswith(_MAGNETIC) for name in table.columns):
        raise InvalidCrystal(
            "malformed", "the symmetry is given as that of a magnetic group; list the operations of the space group"
        )


_CELL: Final = (("length_a", "length_b", "length_c"), ("angle_alpha", "angle_beta", "angle_gamma"))
_STRAIGHT: Final = 180.0
_RIGHT_ANGLE: Final = 90.0


def _cell(table: CifTable) -> tuple[list[float], list[float]]:
    """Lengths and angles; raises InvalidCrystal where one of the numbers is missing."""
    found = []
    for names in _CELL:
        values = [number(table.one(f"_cell_{name}")) for name in names]
        if missing := [f"_cell_{name}" for name, value in zip(names, values, strict=True) if value is None]:
            raise InvalidCrystal("malformed", f"no number for {', '.join(missing)}; is the file complete?")
        found.append([value for value in values if value is not None])
    return found[0], found[1]


def _lattice(table: CifTable) -> NDArray[np.float64]:
    lengths, angles = _cell(table)
    if any(length <= 0 for length in lengths):
        raise InvalidCrystal("malformed", f"cell lengths are {lengths}, expected positive ones")
    if any(not 0 < angle < _STRAIGHT for angle in angles):
        raise InvalidCrystal("malformed", f"cell angles are {angles}, expected between 0 and 180 degrees")
    cosines = np.cos(np.radians(angles))
    if 1 - cosines @ cosines + 2 * cosines.prod() <= 0:
        raise InvalidCrystal("malformed", f"cell angles are {angles}, no three vectors have such")
    return np.asarray(Lattice.from_parameters(*lengths, *angles).matrix)


def _listed_operations(table: CifTable) -> tuple[str, ...]:
    return tuple(text for name in _OPERATIONS for text in table.columns.get(name, ()) if text not in UNSAID)


def _operations(table: CifTable, metric: NDArray[np.float64]) -> Operations:
    """The operations that are listed, else those of the group that is named."""
    texts = _listed_operations(table)
    if not texts:
        return named_operations(table, metric)
    operations = read_operations(texts)
    for text, fits in zip(triplets(operations), operations.fit(metric), strict=True):
        if not fits:
            raise InvalidCrystal("malformed", f"{text!r} is no symmetry operation of the cell")
    return operations


def _product(table: CifTable) -> int:
    """Sites times operations."""
    by_name = _MOST_OPERATIONS if any("group" in name or "int_tables" in name for name in table.columns) else 1
    return count_sites(table) * (len(_listed_operations(table)) or by_name)


def _check_named_group(table: CifTable, crystal: Crystal, operations: Operations) -> bool:
    """Refuse operations that are not those of the group that is named, unless the crystal has its symmetry: all atoms are listed then.

    Returns whether a group is named whose operations they are.
    """
    try:
        allowed, shown = settings_named(table)
    except InvalidCrystal:  # names that nobody understands are of no matter beside operations
        return False
    number = group_number(operations)
    if not allowed or number in {0, *allowed.values()}:
        return bool(allowed) and number != 0
    if not any(_has_symmetry(crystal, read_operations(setting)) for setting in allowed):
        listed = f"{len(operations)} symmetry operations are listed, which are not those of the space group {shown}"
        raise InvalidCrystal("malformed", f"{listed}; correct the one or the other")
    return True


def _has_symmetry(crystal: Crystal, operations: Operations) -> bool:
    """Whether each operation puts every atom where one of its kind is."""
    if not operations.fit(crystal.lattice @ crystal.lattice.T).all():
        return False
    shortest = float(np.linalg.svd(crystal.lattice, compute_uv=False).min())
    for z in crystal.composition:
        coords = crystal.frac_coords[crystal.atomic_numbers == z]
        images = np.einsum("oij,nj->oni", operations.rotations, coords) + operations.translations[:, None]
        wrapped = [np.where((places := some % 1.0) >= 1.0, 0.0, places) for some in (coords, images.reshape(-1, 3))]
        apart, _ = cKDTree(wrapped[0], boxsize=1.0).query(wrapped[1], distance_upper_bound=MOST_APART / shortest)
        if not np.isfinite(apart).all():
            return False
    return True
