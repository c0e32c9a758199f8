"""What a CIF says of its cell's contents beside its atoms, held against the atoms that its symmetry makes of those listed.

A file that has lost its symmetry lists a few atoms and still says how many there are: by its formula and Z, by its density, by the
multiplicities of its sites.  Z alone is wrong at times in files that are else clear, so one count that agrees outweighs another.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import gemmi
import numpy as np

from gnome.crystals.cif_orbits import Orbits
from gnome.crystals.cif_syntax import UNSAID, CifTable, number
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formula import parse_amounts
from gnome.errors import InvalidCrystal, InvalidInput


@dataclass(frozen=True)
class Symmetry:
    """What was made of a block's symmetry: number of operations, orbits of the sites, and where the operations come from.

    `is_sure`: listed and those of the group that is named as well.
    """

    n_operations: int
    orbits: Orbits
    is_listed: bool
    is_sure: bool


@dataclass(frozen=True)
class _Statement:
    """What a block says of how much its cell holds, and whether it holds that; None where that tells nothing."""

    text: str
    agrees: bool | None


def check_contents(table: CifTable, crystal: Crystal, symmetry: Symmetry, formulas: list[dict[int, float]]) -> None:
    """Refuse a block whose Z, density or multiplicities are not those of the crystal that its symmetry makes.

    Z alone is passed over where operations are listed and are those of the group named; a multiplicity where Z or the density agrees.
    `formulas`: amounts by atomic number, in each way to read what the block states.
    Raises InvalidCrystal with reason `malformed`.
    """
    whole = [*_units(table, crystal, formulas), *_density(table, crystal)]
    by_site = [*_multiplicities(table, symmetry), *_wyckoff_letters(table, symmetry)]
    if any(statement.agrees for statement in whole):
        return
    if not (by_site and all(statement.agrees for statement in by_site)) and not (symmetry.is_sure and symmetry.n_operations > 1):
        _refuse(whole, crystal)
    _refuse(by_site, crystal)
    if not symmetry.is_listed and symmetry.n_operations == 1 and (said := _triclinic(table)):
        raise InvalidCrystal(
            "malformed", f"{said} is that of P -1 as well as of P 1, and neither group nor operations are given; name the group"
        )


def _refuse(statements: list[_Statement], crystal: Crystal) -> None:
    if wrong := [statement.text for statement in statements if statement.agrees is False]:
        made = (
            f"its sites and symmetry make {crystal.n_atoms} atoms of {crystal.reduced_formula} in {crystal.volume:.1f} angstrom^3"
        )
        raise InvalidCrystal(
            "malformed",
            f"{made}, which disagrees with {' and '.join(wrong)}; list all symmetry operations, or correct what is said",
        )


_SAME_UNITS: Final = 0.01


def _units(table: CifTable, crystal: Crystal, formulas: list[dict[int, float]]) -> Iterator[_Statement]:
    """Z, by the sum formula, one of its shares where the sum is that of the whole cell, or the formulas of the molecules."""
    units = number(table.one("_cell_formula_units_z"))
    if units is None or units <= 0:
        return
    found = [crystal.n_atoms / sum(amounts.values()) for amounts in [*formulas, *_moieties(table)]]
    is_share = units == round(units) and math.gcd(*crystal.composition.values()) % round(units) == 0
    agrees: bool | None = any(abs(n - units) <= _SAME_UNITS * units for n in found)
    if not found or any(abs(n - 1) < _SAME_UNITS for n in found):
        agrees = is_share and (bool(found) or None)
    yield _Statement(f"Z = {units:g} formula units a cell", agrees)


def _moieties(table: CifTable) -> list[dict[int, float]]:
    """Amounts of a moiety formula, as `C6 H6, 2(H2 O1)`; empty where it is not understood."""
    total: dict[int, float] = {}
    for part in table.one("_chemical_formula_moiety").split(","):
        found = re.fullmatch(r"\s*(\d*\.?\d*)\s*\(?\s*([^()]+?)\s*\)?\s*", part)
        amounts = _sum_formula(re.sub(r"\s*\d*[+-]$", "", found[2])) if found else {}
        if found is None or not amounts:
            return []
        for z, n in amounts.items():
            total[z] = total.get(z, 0.0) + n * float(found[1] or 1)
    return [total] if total else []


_SAME_DENSITY, _OTHER_DENSITY = 0.05, 0.3
_IN_KILOGRAMS: Final = 50.0  # no crystal has so many g/cm^3
_DALTON: Final = 1.66053907  # g/cm^3 of 1 dalton in 1 angstrom^3


def _density(table: CifTable, crystal: Crystal) -> Iterator[_Statement]:
    """The density that was computed from the cell; one that is somewhat off may have been measured."""
    stated = number(table.one("_exptl_crystal_density_diffrn"))
    if stated is None or stated <= 0:
        return
    stated = stated / 1000 if stated > _IN_KILOGRAMS else stated
    mass = sum(gemmi.Element(SYMBOLS[z]).weight * n for z, n in crystal.composition.items())
    found = mass * _DALTON / crystal.volume if crystal.volume else math.inf
    off = abs(found / stated - 1)
    agrees = True if off <= _SAME_DENSITY else False if off > _OTHER_DENSITY else None
    yield _Statement(f"a density of {stated:g} g/cm^3, theirs is {found:.3g}", agrees)


_BY_SITE: Final = (
    "_atom_site_symmetry_multiplicity",
    "_atom_site_site_symmetry_multiplicity",
    "_atom_site_site_symmetry_order",
)


def _multiplicities(table: CifTable, symmetry: Symmetry) -> Iterator[_Statement]:
    """How many atoms a site stands for; some programs write by how many operations it stays in place under the same name."""
    for name in _BY_SITE:
        values = [number(value) for value in table.columns.get(name, ())]
        if len(values) != len(symmetry.orbits.lengths) or not any(values):
            continue
        is_said = np.array([bool(value) for value in values])
        said = np.array([value or 0.0 for value in values])[is_said]
        lengths, shares = symmetry.orbits.lengths[is_said], symmetry.orbits.n_listed[is_said]
        ways = (said == lengths, said * shares == lengths, said * lengths == symmetry.n_operations)
        if any(way.all() for way in ways):
            yield _Statement(f"{name}", True if (lengths > 1).any() else None)
            continue
        i = int(np.flatnonzero(~ways[0])[0])
        label = symmetry.orbits.labels[int(np.flatnonzero(is_said)[i])][:40]
        yield _Statement(f"{name} {said[i]:g} of the site {label!r}, which is {lengths[i]} here", False)


def _wyckoff_letters(table: CifTable, symmetry: Symmetry) -> Iterator[_Statement]:
    """P 1 has one kind of place, which is called a."""
    if symmetry.n_operations > 1:
        return
    for name in ("_atom_site_wyckoff_symbol", "_atom_site_wyckoff_label"):
        letters = [value for value in table.columns.get(name, ()) if value not in UNSAID]
        if others := [letter for letter in letters if letter.lower().lstrip("0123456789 ") != "a"]:
            yield _Statement(f"the Wyckoff letter {others[0][:20]!r}, and no symmetry is given", False)


def _triclinic(table: CifTable) -> str:
    """What says that a block is triclinic."""
    for name, values in table.columns.items():
        if re.search("crystal_system|cell_setting", name) and any(value.lower() == "triclinic" for value in values):
            return f"{name} 'triclinic'"
    return ""


_TERM: Final = re.compile(r"([A-Z][a-z]?)\s*((?:\d+\.?\d*|\.\d+)?)[\s,]*")
_CHARGE: Final = re.compile(r"[\s,]*\d*[+-]\s*$")
_SAME_RATIO: Final = 3e-3


def stated_formulas(table: CifTable) -> tuple[list[dict[int, float]], str]:
    """Amounts by atomic number of the formula that a block states, in each way to read it, and its text; nothing where it states none.

    Raises InvalidCrystal with reason `formula_mismatch` where the sum formula is not understood.
    """
    if text := table.one("_chemical_formula_sum"):
        plain = _CHARGE.sub("", text.strip("'\" ()"))
        spellings = [plain]
        if re.fullmatch(r"(?:[A-Z]{1,2}[\d.]*\s*)+", plain):
            spellings.append(" ".join(word.capitalize() for word in plain.split()))
        found = [amounts for amounts in map(_sum_formula, spellings) if amounts]
        if not found:
            raise InvalidCrystal(
                "formula_mismatch", f"the sum formula {text[:60]!r} is not understood; correct it or leave it out"
            )
        return found, text
    if text := table.one("_chemical_formula_structural"):
        try:
            return [parse_amounts(text)], text
        except InvalidInput:  # it may hold names, dots and charges in any way
            return [], ""
    return [], ""


def _sum_formula(text: str) -> dict[int, float]:
    """Amounts of a formula without brackets, as `Cl Na2 O0.5`; empty where it is not understood."""
    amounts: dict[int, float] = {}
    place = 0
    while place < len(text):
        term = _TERM.match(text, place)
        symbol = "H" if term and term[1] == "D" else term[1] if term else ""
        if term is None or symbol not in SYMBOLS[1:]:
            return {}
        z = SYMBOLS.index(symbol)
        amounts[z] = amounts.get(z, 0.0) + float(term[2] or 1)
        place = term.end()
    return {z: amount for z, amount in amounts.items() if amount > 0}


def check_formula(crystal: Crystal, formulas: list[dict[int, float]], text: str) -> None:
    """Refuse a crystal that is none of the formulas, by any number of units; raises InvalidCrystal with reason `formula_mismatch`."""
    if formulas and not any(_is_composition(crystal, amounts) for amounts in formulas):
        message = f"{crystal.reduced_formula} and {text[:60]!r}"
        raise InvalidCrystal("formula_mismatch", f"the listed atoms disagree with the formula ({message}); is it complete?")


def _is_composition(crystal: Crystal, amounts: dict[int, float]) -> bool:
    if set(crystal.composition) != set(amounts):
        return False
    ratios = [n / amounts[z] for z, n in crystal.composition.items()]
    return max(ratios) <= min(ratios) * (1 + _SAME_RATIO)
