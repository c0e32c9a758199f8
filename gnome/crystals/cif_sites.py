"""The atoms that a CIF lists: their elements and coordinates, with all that is no ordered crystal refused."""

import re
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gnome.crystals.cif_syntax import UNSAID, CifTable, number, precision
from gnome.crystals.elements import SYMBOLS
from gnome.errors import InvalidCrystal

_SYMBOLS: Final = frozenset(SYMBOLS[1:])
_ISOTOPES: Final = frozenset({"D", "T"})
_FULL: Final = 1e-4  # how far an occupancy may be from 1
_AXES: Final = "xyz"


@dataclass(frozen=True, eq=False)
class Sites:
    """Sites as listed: labels, atomic numbers (n), fractional coordinates (n, 3), and a unit of each coordinate's last digit (n, 3)."""

    labels: tuple[str, ...]
    atomic_numbers: NDArray[np.int64]
    frac_coords: NDArray[np.float64]
    units: NDArray[np.float64]


def count_sites(table: CifTable) -> int:
    """How many sites a block lists."""
    return len(table.column("_atom_site_fract_x", "_atom_site_cartn_x"))


def read_sites(table: CifTable, formula: frozenset[str], lengths: NDArray[np.float64] | None) -> Sites:
    """Read the sites of a block.

    `formula`: symbols in its chemical formula, which tell in doubt what a label means; empty where there is none.  `lengths` (3) of the
    cell, angstrom, where all its angles are right; Cartesian coordinates are read there only.
    Raises InvalidCrystal with reason `malformed`, `disordered`, `isotope` or `unsupported_element`.
    """
    if not count_sites(table):
        raise InvalidCrystal("malformed", "no atoms are listed (_atom_site_fract_x); is the file complete?")
    _check_one_loop(table)
    _check_whole(table)
    labels = table.column("_atom_site_label", "_atom_site_type_symbol")
    coords, units = _coordinates(table, lengths)
    return Sites(labels, np.array([SYMBOLS.index(symbol) for symbol in _elements(table, formula)]), coords, units)


def _check_one_loop(table: CifTable) -> None:
    names = [name for name in table.columns if re.match(r"_atom_site_(?!s_|aniso_|moment_|fourier_)", name)]
    if len({table.loops[name] for name in names}) > 1 and count_sites(table) > 1:
        raise InvalidCrystal("malformed", f"{', '.join(names)[:200]} stand in several loops; put them into one")


def _check_whole(table: CifTable) -> None:
    """Refuse what is no atom that is there for certain, once, and alone."""
    for occupancy in table.column("_atom_site_occupancy"):
        value = number(occupancy)
        if occupancy != "?" and (value is None or abs(value - 1) > _FULL):
            raise InvalidCrystal("disordered", f"a site has the occupancy {occupancy!r}, expected 1; give an ordered crystal")
    groups = {value for value in table.column("_atom_site_disorder_group") if value not in UNSAID | {"0"}}
    if len(groups) > 1 or any(group.startswith("-") for group in groups):
        raise InvalidCrystal(
            "disordered", f"sites stand in the disorder groups {', '.join(sorted(groups))[:60]}; give an ordered crystal"
        )
    if any(number(value) for value in table.column("_atom_site_attached_hydrogens")):
        raise InvalidCrystal("malformed", "a site has attached hydrogens that are not listed; list them as sites")
    if any(value.lower() == "dum" for value in table.column("_atom_site_calc_flag")):
        raise InvalidCrystal("malformed", "a site is a dummy (_atom_site_calc_flag dum), which is no atom; leave it out")


def _coordinates(table: CifTable, lengths: NDArray[np.float64] | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    kind = "fract" if "_atom_site_fract_x" in table.columns else "cartn"
    coords, units = [], []
    for axis in _AXES:
        name = f"_atom_site_{kind}_{axis}"
        column = table.column(name)
        values = [number(value) for value in column]
        if missing := [value for value, found in zip(column, values, strict=True) if found is None]:
            raise InvalidCrystal("malformed", f"a site has no number for {name} but {missing[0][:40]!r}; write the coordinate")
        if len(values) != count_sites(table):
            raise InvalidCrystal("malformed", f"{count_sites(table)} sites, {len(values)} of them have a {name}")
        coords.append([value or 0.0 for value in values])
        units.append([precision(value) for value in column])
    found, unit = np.array(coords).T, np.array(units).T
    if kind == "fract":
        return found, unit
    if lengths is None or any("cartn_tran" in name or "fract_tran" in name for name in table.columns):
        raise InvalidCrystal("malformed", "Cartesian coordinates in a cell whose axes they do not follow; write fractional ones")
    return found / lengths, unit / lengths


def _elements(table: CifTable, formula: frozenset[str]) -> list[str]:
    n_sites = count_sites(table)
    symbols = table.column("_atom_site_type_symbol") or ("?",) * n_sites
    labels = table.column("_atom_site_label") or ("?",) * n_sites
    if len(symbols) != n_sites or len(labels) != n_sites:
        raise InvalidCrystal("malformed", f"{n_sites} sites, {len(labels)} labels and {len(symbols)} type symbols")
    in_capitals = _are_in_capitals(symbols)
    return [
        _of_label(label, formula) if symbol in UNSAID else _of_symbol(symbol, formula, in_capitals=in_capitals)
        for symbol, label in zip(symbols, labels, strict=True)
    ]


_CHARGED: Final = re.compile(r"([A-Za-z]{1,2})(\d*\.?\d*[+-]|[+-]\d*\.?\d*|)")
_NUMBERED: Final = re.compile(r"([A-Z][a-z]?)\d+")  # a label in the place of a symbol; NO3 is no nobelium


_KNOWN_IN_BULK: Final = SYMBOLS.index("Cf")  # the heaviest of which there are crystals: CN and NO are no copernicium and nobelium


def _are_in_capitals(symbols: tuple[str, ...]) -> bool:
    """Whether NA or CL proves that symbols stand in capitals, which CO alone does not."""
    if any(re.match("[A-Z][a-z]", symbol) for symbol in symbols):
        return False
    letters = [found[1].upper() for symbol in symbols if (found := _CHARGED.fullmatch(symbol))]
    return any(len(pair) == 2 and pair.capitalize() in _SYMBOLS and not set(pair) <= _SYMBOLS for pair in letters)


def _of_symbol(text: str, formula: frozenset[str], *, in_capitals: bool) -> str:
    """Element of a type symbol: Cs, Cs1+, Cs+, Cs+1, Cl-, Na1; CS only where the formula or another symbol tells it from C and S."""
    if re.match(r"\d+[A-Za-z]", text):
        raise InvalidCrystal("isotope", f"{text[:20]} is an isotope; write the element alone")
    found = _CHARGED.fullmatch(text) or _NUMBERED.fullmatch(text)
    symbol = found[1].capitalize() if found else ""
    if found and found[1] != symbol and len(symbol) == 2 and set(found[1].upper()) <= _SYMBOLS and symbol in _SYMBOLS:
        is_heavy = SYMBOLS.index(symbol) > _KNOWN_IN_BULK
        if not (symbol in formula if formula else in_capitals and not is_heavy):
            raise InvalidCrystal(
                "unsupported_element",
                f"the type symbol {text[:20]!r} may mean {symbol} or {' and '.join(found[1].upper())}; write {symbol} if it is that",
            )
    if symbol in _ISOTOPES:
        raise InvalidCrystal("isotope", f"{symbol} is an isotope; write it as H")
    if symbol not in _SYMBOLS:
        raise InvalidCrystal(
            "unsupported_element", f"the type symbol {text[:20]!r} is not that of an element; write it as Na or Na1+"
        )
    return symbol


def _of_label(label: str, formula: frozenset[str]) -> str:
    """Element of a label: its first letters where they are a symbol in its own spelling; where capitals leave a doubt, the formula's.

    NA1 may be sodium or a nitrogen called A1.
    """
    found = re.match(r"([A-Za-z]+)(?![A-Za-z])", label)
    letters = found[1] if found else ""
    if letters in _ISOTOPES and letters not in formula:
        raise InvalidCrystal("isotope", f"{label[:20]} is an isotope; write it as H")
    if letters in _SYMBOLS and (len(letters) == 2 or not formula or letters in formula):
        return letters
    if len(letters) == 2 or formula:
        candidates = {letters[:2].capitalize(), letters[:1].upper()} & _SYMBOLS
        candidates = candidates & formula if formula else candidates if letters.isupper() else set()
        if len(candidates) == 1:
            return candidates.pop()
    raise InvalidCrystal(
        "malformed", f"elements cannot be told from the labels of the atoms ({label[:20]!r}); add _atom_site_type_symbol"
    )
