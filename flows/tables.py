"""Columns of the tables that users bring, found by any of their usual names."""

from pathlib import Path

from gnome.crystals.energy_fields import ALIASES
from gnome.errors import InvalidInput
from gnome.quantities import Quantity

FORMULA_COLUMNS = ("formula", str(Quantity.REDUCED_FORMULA), "composition")
"""Names under which a table may hold its formulas."""
E_FORM_COLUMNS = (
    str(Quantity.E_FORM_PER_ATOM),
    *(other for other, meant in ALIASES.items() if meant == Quantity.E_FORM_PER_ATOM),
)
"""Names under which it may hold formation energies, eV/atom."""


def find_column(path: Path, names: list[str], wanted: tuple[str, ...]) -> str | None:
    """Find a column by the first of its names that is there, spaces and case aside; raises InvalidInput where there are several."""
    for name in wanted:
        found = [own for own in names if own.strip().lower() == name]
        if len(found) > 1:
            raise InvalidInput(f"{path}: has {len(found)} columns named {name}; keep one")
        if found:
            return found[0]
    return None


def column_of(path: Path, names: list[str], wanted: tuple[str, ...]) -> str:
    """Find a column that has to be there; raises InvalidInput where it is not."""
    found = find_column(path, names, wanted)
    if found is None:
        raise InvalidInput(f"{path}: no column {' or '.join(wanted)}; it has {', '.join(names) or 'none'}")
    return found
