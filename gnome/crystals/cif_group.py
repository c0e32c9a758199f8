"""What a CIF means that names a space group and lists none of its operations: read only where there is one answer.

pymatgen takes the first name it knows, else the number in its standard setting, else P1.  Another origin or other axes make another crystal
of the same coordinates, so a doubt is refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, Final

import numpy as np
import spglib
from numpy.typing import NDArray
from pymatgen.core.operations import SymmOp
from pymatgen.io.cif import CifBlock, CifParser

from gnome.errors import InvalidCrystal

METRIC_TOLERANCE: Final = 0.02
"""How far an operation may change lengths and angles, relative to the largest squared length: cells are written with few digits."""

_NAME: Final = re.compile(r"group.*name", re.IGNORECASE)
_NUMBER: Final = re.compile(r"IT_number|Int_Tables_number", re.IGNORECASE)
_LIST_THEM: Final = "and no symmetry operations are listed; list them"


def is_isometry(rotation: NDArray[np.float64], metric: NDArray[np.float64]) -> bool:
    """Whether a rotation leaves a cell with this metric tensor as it is."""
    change = np.abs(rotation.T @ metric @ rotation - metric).max()
    return bool(change <= METRIC_TOLERANCE * metric.max())


def named_operations(parser: CifParser, block: CifBlock, metric: NDArray[np.float64]) -> list[str]:
    """Return the operations that a block means which lists none, as it would list them.

    Raises InvalidCrystal with reason `malformed` where the name or number of its space group leaves a doubt.
    """
    names, numbers = (list(_meant(block.data, key)) for key in (_NAME, _NUMBER))
    if not names and not numbers:
        return ["x, y, z"]
    shown = " and ".join(map(repr, [*names, *numbers]))
    operations = _operations_by_name(parser, block) if names else list(parser.get_symops(block))
    plain = all(re.sub(r"[\s_]", "", name) in {"P1", "1"} for name in names or numbers)
    if len(operations) == 1 and not plain:
        raise InvalidCrystal("malformed", f"the space group {shown} is not understood {_LIST_THEM}")
    rotations = np.array([operation.rotation_matrix for operation in operations])
    if not all(is_isometry(rotation, metric) for rotation in rotations):
        raise InvalidCrystal("malformed", f"the cell has not the symmetry of the space group {shown}, {_LIST_THEM}")
    translations = np.array([operation.translation_vector for operation in operations])
    found = spglib.get_spacegroup_type_from_symmetry(np.rint(rotations).astype(int), translations)
    if found is None or any(number != str(found.number) for number in numbers):
        raise InvalidCrystal("malformed", f"the space group is given as {shown}, which disagree, {_LIST_THEM}")
    if _is_ambiguous(found.number, named=bool(names)):
        raise InvalidCrystal("malformed", f"the space group {shown} has several settings {_LIST_THEM}")
    return [operation.as_xyz_str() for operation in operations]


def _meant(table: Mapping[str, Any], key: re.Pattern[str]) -> Iterator[str]:
    """Values of the keys that fit, but for those that say nothing."""
    for name, value in table.items():
        text = str(value).strip()
        if key.search(name) and text not in {"", "?", "."}:
            yield text


def _operations_by_name(parser: CifParser, block: CifBlock) -> Sequence[SymmOp]:
    """What pymatgen makes of the names alone; of a number beside one that it does not know it would take the standard setting."""
    without = copy(block)
    without.data = {
        key: _SHORT.sub(r"\1 1 \2 1", str(value).strip()) if _NAME.search(key) else value
        for key, value in block.data.items()
        if not _NUMBER.search(key)
    }
    return list(parser.get_symops(without))


_SHORT: Final = re.compile(r"^([PABCI])[\s_]*(2_?1?|m|[abcn]|2_?1?/[mabcn])$")
"""Short names of monoclinic groups, as P 21/c, by convention along b; pymatgen knows only some of them."""


def _is_ambiguous(number: int, *, named: bool) -> bool:
    """Whether a group has two origins, or, where only its number is given, several settings that the cell does not tell apart."""
    choices = _choices()[number]
    if {"1", "2"} & choices:
        return True
    return not named and len(choices) > 1 and "R" not in choices


@lru_cache
def _choices() -> dict[int, frozenset[str]]:
    """Origins and axes of each space group, by its number."""
    found: dict[int, set[str]] = {}
    for hall in range(1, 531):
        kind = spglib.get_spacegroup_type(hall)
        if kind is not None:
            found.setdefault(kind.number, set()).add(kind.choice)
    return {number: frozenset(choices) for number, choices in found.items()}
