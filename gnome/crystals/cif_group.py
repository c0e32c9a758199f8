"""What a CIF means that names a space group and lists none of its operations: read only where there is one answer.

Another origin or other axes make another crystal of the same coordinates, so a doubt is refused.  Names, numbers and Hall symbols each
leave some settings open; what all of them and the cell allow must be one.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

import gemmi
import numpy as np
import spglib
from numpy.typing import NDArray

from gnome.crystals.cif_operations import Operations, read_operations
from gnome.crystals.cif_syntax import UNSAID, CifTable
from gnome.errors import InvalidCrystal

_LIST_THEM: Final = "and no symmetry operations are listed; list them"
_KINDS: Final = {
    re.compile(r"_(symmetry_)?space_group_name_h-m(_alt|_full)?"): "name",
    re.compile(r"_(symmetry_)?space_group_name_hall"): "hall",
    re.compile(r"_(symmetry_)?space_group_name_schoenflies"): "schoenflies",
    re.compile(r"_(symmetry_)?(space_group_)?(it_number|int_tables_number)"): "number",
    re.compile(r"_space_group_it_coordinate_system_code"): "code",
}
_MAY_MEAN_MORE: Final = re.compile(r".*(group.*name|it_number|int_tables_number|symop|equiv_pos|crystal_system|cell_setting).*")
_BY_SITE: Final = {
    re.compile(r"_atom_site_(site_)?symmetry_(multiplicity|order)"): re.compile(r"1(\.0*)?"),
    re.compile(r"_atom_site_wyckoff_(symbol|label)"): re.compile(r"1?[aA]"),
}
"""What sites say of their symmetry, and what all of them say in P1."""
_RIGHT: Final = 1e-3
"""Degrees within which an angle is a right one."""

Setting = tuple[str, ...]
"""The operations of a setting, as sorted triplets."""


def settings_named(table: CifTable) -> tuple[dict[Setting, int], str]:
    """Settings that a block's names and numbers allow, each with its number in the International Tables; and what they say, to be shown.

    Empty texts where nothing is named.  Raises InvalidCrystal with reason `malformed` for what is not understood or disagrees.
    """
    allowed: dict[Setting, int] | None = None
    stated = list(_stated(table))
    shown = " and ".join(repr(value[:60]) for _, value in stated)
    for kind, value in stated:
        found = _BY_KIND[kind](value)
        if not found:
            raise InvalidCrystal("malformed", f"the space group {value[:60]!r} is not understood {_LIST_THEM}")
        if kind == "hall" and set(found.values()) == {0}:  # a cell that the tables do not have: known by its operations alone
            found = dict.fromkeys(found, _number_of(next(iter(found))))
        allowed = found if allowed is None else {setting: n for setting, n in found.items() if setting in allowed}
    if allowed is not None and not allowed:
        raise InvalidCrystal("malformed", f"the space group is given as {shown}, which disagree, {_LIST_THEM}")
    return allowed or {}, shown


def named_operations(table: CifTable, metric: NDArray[np.float64]) -> Operations:
    """Return the operations that a block means which lists none.

    Raises InvalidCrystal with reason `malformed` where the name or number of its space group leaves a doubt.
    """
    allowed, shown = settings_named(table)
    if not allowed:
        _refuse_hints(table)
        return read_operations(())
    fitting = [setting for setting in allowed if read_operations(setting).fit(metric).all()]
    if not fitting:
        raise InvalidCrystal("malformed", f"the cell has not the symmetry of the space group {shown}, {_LIST_THEM}")
    if len(allowed) > 1:  # a cube is no rhombohedral cell that somebody forgot to call one
        fitting = [setting for setting in fitting if not (setting in _rhombohedral() and _is_right(metric))]
    if len(fitting) != 1:
        raise InvalidCrystal(
            "malformed", f"the space group {shown} has several settings {_LIST_THEM}, or name one as in 'F d -3 m :2'"
        )
    return read_operations(fitting[0])


def _is_right(metric: NDArray[np.float64]) -> bool:
    lengths = np.sqrt(np.diag(metric))
    cosines = (metric / np.outer(lengths, lengths))[np.triu_indices(3, 1)]
    return bool(np.abs(cosines).max() < np.radians(_RIGHT))


def _stated(table: CifTable) -> Iterator[tuple[str, str]]:
    """What a block says of its group: kind of name, and value."""
    for name, values in table.columns.items():
        kind = next((kind for pattern, kind in _KINDS.items() if pattern.fullmatch(name)), None)
        if kind is not None:
            yield from ((kind, value) for value in values if value not in UNSAID)


def _refuse_hints(table: CifTable) -> None:
    """Refuse a block that says in another way that it is not in P1, where all its atoms would be listed."""
    for name, values in table.columns.items():
        said = [value for value in values if value not in UNSAID and value.lower() != "triclinic"]
        if _MAY_MEAN_MORE.fullmatch(name) and (said or "symop" in name or "equiv_pos" in name):
            value = f" {said[0][:40]!r}" if said else ""
            raise InvalidCrystal("malformed", f"{name}{value} speaks of symmetry, no space group is named {_LIST_THEM}")
        for pattern, in_p1 in _BY_SITE.items():
            other = [value for value in values if value not in UNSAID and not in_p1.fullmatch(value)]
            if other and pattern.fullmatch(name):
                raise InvalidCrystal(
                    "malformed", f"{name} {other[0][:40]!r} speaks of symmetry, no space group is named {_LIST_THEM}"
                )


_SUFFIX: Final = re.compile(
    r"(?P<base>.*?)[\s_(]*(?::[\s_]*(?P<code>[-\w]+)|(?P<letter>[szhr])|(?:origin|o)[\s_]*(?:choice)?[\s_]*(?P<origin>[12]))\s*\)?",
    re.IGNORECASE,
)
_LETTERS: Final = {"s": "1", "z": "2"}
"""The Inorganic Crystal Structure Database's letters: origin choice 1, and the one at a centre of inversion, 2."""


def _by_name(name: str) -> dict[Setting, int]:
    """Settings that a Hermann-Mauguin symbol allows: short or full, old or new, with or without the setting behind it."""
    name = name.strip()
    if name.isdigit():
        return _by_number(name)
    base, code = name, ""
    if found := _SUFFIX.fullmatch(name):
        base, code = found["base"], (found["code"] or found["letter"] or found["origin"]).lower()
        code = _LETTERS.get(code, code)
        if _SUFFIX.fullmatch(base):
            return {}
    elif name[0] in "Hh":  # the Protein Data Bank's way to say R in hexagonal axes
        code = "h"
    base = re.sub(r"[\s_]", "", base)
    entries = [entry for entry in _entries() if _compressed(base) in entry[1]]
    if not entries and base and not base.isdigit() and (group := gemmi.find_spacegroup_by_name(base)) is not None:
        entries = [entry for entry in _entries() if entry[0].hm == group.hm]  # it knows old and new ways to write one
    return {_setting(group): group.number for group, _ in entries if not code or code in _codes(group)}


def _by_number(text: str) -> dict[Setting, int]:
    """Settings in the International Tables of a group by its number."""
    return {_setting(group): group.number for group in gemmi.spacegroup_table_itb() if str(group.number) == text.strip()}


def _by_hall(symbol: str) -> dict[Setting, int]:
    """The setting that a Hall symbol states; number 0 where it is in no table."""
    try:
        operations = gemmi.symops_from_hall(re.sub(r"[\s_]+", " ", symbol).strip())
    except (RuntimeError, ValueError):
        return {}
    group = gemmi.find_spacegroup_by_ops(operations)
    return {tuple(sorted(operation.triplet() for operation in operations)): group.number if group else 0}


def _by_schoenflies(symbol: str) -> dict[Setting, int]:
    numbers = {kind.number for kind in _types() if _schoenflies(kind.schoenflies) == _schoenflies(symbol)}
    return {setting: number for number in numbers for setting, _ in _by_number(str(number)).items()}


def _schoenflies(symbol: str) -> str:
    return re.sub(r"[\s_.^]", "", symbol).lower()


def _by_code(code: str) -> dict[Setting, int]:
    return {_setting(group): group.number for group, _ in _entries() if code.strip().lower() in _codes(group)}


_BY_KIND: Final = {"name": _by_name, "number": _by_number, "hall": _by_hall, "schoenflies": _by_schoenflies, "code": _by_code}


def _codes(group: gemmi.SpaceGroup) -> set[str]:
    """What may stand behind the name of a setting: 1, 2, h, r, b1, cab, 2cab ..."""
    extension = group.ext.strip("\0").lower()
    return {extension, group.qualifier, extension + group.qualifier} - {""}


def _compressed(name: str) -> str:
    return re.sub(r"[\s_]", "", name).lower()


@lru_cache(maxsize=1)
def _entries() -> tuple[tuple[gemmi.SpaceGroup, frozenset[str]], ...]:
    """All settings, each with the names it goes by: short, and full as `F 4_1/d -3 2/m`."""
    full = {
        _plain(group): _compressed(kind.international_full)
        for group, kind in zip(gemmi.spacegroup_table_itb(), _types(), strict=True)
    }
    return tuple(
        (group, frozenset({_compressed(group.hm), full.get(_plain(group), "")} - {""})) for group in gemmi.spacegroup_table()
    )


def _plain(group: gemmi.SpaceGroup) -> tuple[int, str, str]:
    return group.number, group.xhm(), group.qualifier


@lru_cache(maxsize=1)
def _types() -> tuple[spglib.SpaceGroupType, ...]:
    """The 530 settings of the International Tables in spglib's order, which is gemmi's."""
    kinds = (spglib.get_spacegroup_type(hall) for hall in range(1, 531))
    return tuple(kind for kind in kinds if kind is not None)


@lru_cache(maxsize=600)
def _setting_of(xhm: str, qualifier: str) -> Setting:
    group = next(group for group, _ in _entries() if (group.xhm(), group.qualifier) == (xhm, qualifier))
    return tuple(sorted(operation.triplet() for operation in group.operations()))


def _setting(group: gemmi.SpaceGroup) -> Setting:
    return _setting_of(group.xhm(), group.qualifier)


@lru_cache(maxsize=1)
def _rhombohedral() -> frozenset[Setting]:
    return frozenset(_setting(group) for group, _ in _entries() if group.ext == "R")


def group_number(operations: Operations) -> int:
    """Number in the International Tables of the group that operations are, in whatever cell; 0 where it is not found."""
    found = spglib.get_spacegroup_type_from_symmetry(operations.rotations.astype(np.int32), operations.translations)
    return int(found.number) if found is not None else 0


def _number_of(setting: Setting) -> int:
    return group_number(read_operations(setting))
