"""Crystals from the database into files that other programs read."""

from pathlib import Path

from gnome.crystals.formats import ReadCrystal
from gnome.crystals.writers import check_target, write_crystals
from gnome.database.query import query
from gnome.database.store import Store
from gnome.errors import InvalidInput
from gnome.quantities import Quantity

_COLUMNS = (
    Quantity.ID, Quantity.REDUCED_FORMULA, Quantity.METHOD, Quantity.ENERGY_PER_ATOM, Quantity.CORRECTION_PER_ATOM,
    Quantity.E_FORM_PER_ATOM, Quantity.E_ABOVE_HULL, Quantity.DECOMPOSITION_ENERGY, Quantity.SPACE_GROUP_NUMBER,
    Quantity.PROTOSTRUCTURE, Quantity.ORIGIN, Quantity.ROUND, Quantity.PARENT, Quantity.GENERATOR,
)  # fmt: skip


def export_crystals(store: Store, out: Path, where: str = "") -> int:
    """Write the crystals that a filter matches; the ending of `out` chooses the format.  Returns how many."""
    check_target(out)
    rows = query(store, where, sort=Quantity.ID, with_crystals=True)
    if not rows:
        raise InvalidInput(f"no crystal matches {where!r}; nothing was written")
    items = [
        ReadCrystal(label=row[Quantity.ID], crystal=row["crystal"], fields={str(name): row[name] for name in _COLUMNS})
        for row in rows
    ]
    return write_crystals(out, items, kind=None if out.suffix else "cif")
