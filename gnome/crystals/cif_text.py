"""Writing a crystal as CIF with its symmetry: group, operations and asymmetric unit, in the cell that the crystal has.

The cell and its number of atoms stay as they are.  The origin moves where the group's own names ask for it.  What would come back more than
`MOST_MOVED` away from where it was is written in P1.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

import gemmi
import numpy as np
import spglib
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from gnome.crystals.cif import parse_block
from gnome.crystals.cif_operations import Operations, read_operations, triplets
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.errors import InvalidCrystal

MOST_MOVED: Final = 1e-4
"""Angstrom that an atom may be moved by the symmetry that is written."""

_GRID: Final = 24
_ON_GRID: Final = 1e-3
_MOST_ATOMS: Final = 1_000  # of which the symmetry is looked for: an export is no place to wait


def cif_text(crystal: Crystal, name: str, said: Mapping[str, float | str] | None = None) -> str:
    """CIF text of a data block of that name; `said`: more items of the block, values by data name."""
    more = [f"{item} {_quoted(value) if isinstance(value, str) else repr(value)}\n" for item, value in (said or {}).items()]
    head, rest = _cif_text(crystal, name).split("\n", 1)
    return f"{head}\n{''.join(more)}{rest}"


def _cif_text(crystal: Crystal, name: str) -> str:
    everything = np.arange(crystal.n_atoms)
    in_p1 = _text(crystal, name, everything, crystal.frac_coords, read_operations(()), gemmi.find_spacegroup_by_number(1), 1)
    if crystal.n_atoms > _MOST_ATOMS:
        return in_p1
    cell: Any = (crystal.lattice, crystal.frac_coords, crystal.atomic_numbers)  # its types ask for lists, it takes arrays
    try:
        found = spglib.get_symmetry_dataset(cell, symprec=MOST_MOVED)
    except spglib.SpglibError:
        found = None
    if found is None or len(found.rotations) == 1 or np.abs(found.rotations).max() > 1:
        return in_p1
    origin, operations, group = _in_own_origin(found)
    unit = np.unique(found.crystallographic_orbits, return_index=True)[1]
    text = _text(crystal, name, np.sort(unit), crystal.frac_coords + origin, operations, group, found.number)
    return text if _comes_back(text, crystal, origin) else in_p1


def _in_own_origin(found: spglib.SpglibDataset) -> tuple[NDArray[np.float64], Operations, gemmi.SpaceGroup | None]:
    """What is added to coordinates (3), the operations then, and the setting of the tables that they are, if any.

    The crystal's own origin is kept where it serves.
    """
    standard = np.asarray(np.linalg.solve(found.transformation_matrix, found.origin_shift), dtype=np.float64)
    tried = []
    origins: list[NDArray[np.float64]] = [np.zeros(3), standard]
    for origin in origins:
        shifts = found.translations + origin - found.rotations @ origin
        whole = np.rint(shifts * _GRID) / _GRID
        is_on_grid = bool(np.abs(shifts - whole).max() < _ON_GRID)
        operations = Operations(found.rotations.astype(np.int64), whole if is_on_grid else shifts)
        group = _setting(operations) if is_on_grid else None
        if group is not None and group.number == found.number:
            return origin, operations, group
        tried.append((not is_on_grid, origin, operations))
    _, origin, operations = min(tried, key=lambda one: one[0])
    return origin, operations, None


def _setting(operations: Operations) -> gemmi.SpaceGroup | None:
    return gemmi.find_spacegroup_by_ops(gemmi.GroupOps([gemmi.Op(text) for text in triplets(operations)]))


def _comes_back(text: str, crystal: Crystal, origin: NDArray[np.float64]) -> bool:
    """Whether the text is read as the crystal, each atom within `MOST_MOVED` of where it was."""
    try:
        read = parse_block(text)
    except InvalidCrystal:
        return False
    if read.composition != crystal.composition or not np.allclose(
        read.lattice @ read.lattice.T, crystal.lattice @ crystal.lattice.T
    ):
        return False
    for z in crystal.composition:
        ours, theirs = (
            np.where((wrapped := coords % 1.0) >= 1.0, 0.0, wrapped)
            for coords in (crystal.frac_coords[crystal.atomic_numbers == z] + origin, read.frac_coords[read.atomic_numbers == z])
        )
        _, nearest = cKDTree(theirs, boxsize=1.0).query(ours)
        apart = ours - theirs[nearest]
        moved = np.linalg.norm((apart - np.rint(apart)) @ crystal.lattice, axis=1)
        if len(set(nearest.tolist())) < len(ours) or moved.max() > MOST_MOVED:
            return False
    return True


def _text(
    crystal: Crystal,
    name: str,
    unit: NDArray[np.int64],
    coords: NDArray[np.float64],
    operations: Operations,
    group: gemmi.SpaceGroup | None,
    number: int,
) -> str:
    """The block; `unit`: which atoms are listed, with `coords` of all."""
    return "\n".join(
        [
            f"data_{name}",
            *_formula_lines(crystal),
            *_cell_lines(crystal),
            *_group_lines(group, number),
            "loop_",
            "_space_group_symop_id",
            "_space_group_symop_operation_xyz",
            *(f"{place} '{text}'" for place, text in enumerate(triplets(operations), start=1)),
            "loop_",
            *(f"_atom_site_{column}" for column in ("label", "type_symbol", "fract_x", "fract_y", "fract_z", "occupancy")),
            *_site_lines(crystal, unit, coords),
            "",
        ]
    )


def _formula_lines(crystal: Crystal) -> Iterator[str]:
    amounts = {SYMBOLS[z]: n for z, n in crystal.composition.items()}
    n_units = math.gcd(*amounts.values())
    first = ["C", "H"] if "C" in amounts else []  # Hill's order
    order = [symbol for symbol in first if symbol in amounts] + sorted(set(amounts) - set(first))
    parts = [symbol + (str(n) if (n := amounts[symbol] // n_units) > 1 else "") for symbol in order]
    yield f"_chemical_formula_structural {crystal.reduced_formula}"
    yield f"_chemical_formula_sum '{' '.join(parts)}'"
    yield f"_cell_formula_units_Z {n_units}"


def _cell_lines(crystal: Crystal) -> Iterator[str]:
    lengths = np.linalg.norm(crystal.lattice, axis=1)
    cosines = (crystal.lattice @ crystal.lattice.T) / np.outer(lengths, lengths)
    angles = np.degrees(np.arccos(np.clip(cosines[[1, 0, 0], [2, 2, 1]], -1, 1)))
    yield from (f"_cell_length_{axis} {length:.10f}" for axis, length in zip("abc", lengths, strict=True))
    yield from (f"_cell_angle_{axis} {angle:.10f}" for axis, angle in zip(("alpha", "beta", "gamma"), angles, strict=True))
    yield f"_cell_volume {crystal.volume:.8f}"


def _group_lines(group: gemmi.SpaceGroup | None, number: int) -> Iterator[str]:
    """Names of the setting where the tables have it; of a group in another cell its number, and its name in the reference setting."""
    yield f"_space_group_IT_number {number}"
    if group is not None:
        yield f"_space_group_name_H-M_alt '{group.xhm()}'"
        yield f"_space_group_name_Hall {_quoted(group.hall)}"
    elif (reference := gemmi.find_spacegroup_by_number(number)) is not None:
        yield f"_space_group_name_H-M_ref '{reference.xhm()}'"


def _quoted(text: str) -> str:
    return f"'{text}'" if '"' in text else f'"{text}"'


def _site_lines(crystal: Crystal, unit: NDArray[np.int64], coords: NDArray[np.float64]) -> Iterator[str]:
    seen: Counter[str] = Counter()
    for i in unit:
        symbol = crystal.symbols[i]
        seen[symbol] += 1
        places = " ".join(f"{value:.12f}" for value in coords[i] % 1.0)
        yield f"{symbol}{seen[symbol]} {symbol} {places} 1"
