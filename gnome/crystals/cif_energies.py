"""Energies in a CIF: items of ours in its data block, which other programs pass over."""

from typing import Any, Final

from gnome.crystals.cif_syntax import number, read_table
from gnome.crystals.entries import NUMERIC_FIELDS
from gnome.errors import InvalidCrystal
from gnome.quantities import Quantity

CIF_PREFIX: Final = "_gnome_"


def cif_energies(block: str) -> dict[str, Any]:
    """Energies and method that a data block holds as `_gnome_energy_per_atom` and so on; raises InvalidCrystal for what is no number."""
    if CIF_PREFIX not in block.lower():
        return {}
    table = read_table(block)
    fields: dict[str, Any] = {}
    for name in sorted({*NUMERIC_FIELDS, str(Quantity.METHOD)}):
        text = table.one(f"{CIF_PREFIX}{name}")
        if not text:
            continue
        value = text if name == Quantity.METHOD else number(text)
        if value is None:
            raise InvalidCrystal("energy", f"{CIF_PREFIX}{name} is {text[:60]!r}, expected a number")
        fields[name] = value
    return fields
