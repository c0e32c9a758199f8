"""What was found, for Python: `found_crystals` gives a pandas DataFrame with a pymatgen Structure a row.

from flows.found import found_crystals
near = found_crystals('elements HAS "O" AND _gnome_e_above_hull < 0.05')
"""

from collections.abc import Sequence

import pandas as pd

from flows.settings import Settings
from gnome.crystals.convert import to_structure
from gnome.database.crystal_store import SHOWN_COLUMNS
from gnome.database.query import query
from gnome.database.store import Store
from gnome.quantities import Quantity


def found_crystals(
    where: str = "",
    *,
    database: str = "",
    sort: str | Sequence[str] = Quantity.E_ABOVE_HULL.value,
    limit: int | None = None,
    structures: bool = True,
) -> pd.DataFrame:
    """Find the crystals of a database that an OPTIMADE filter matches; all when it is empty.

    A row a crystal and method, with the columns of `gnome query --format json` (energies eV/atom) and, unless `structures` is False, its
    pymatgen Structure in the column `structure`; indexed 0, 1, ... in the order of `sort`, as `gnome query --sort` takes it.
    `database` is a URL or a path, that of the settings when empty.  Raises InvalidInput for a filter or a sort that cannot be used, and
    DatabaseUnavailable where no database is.
    """
    with Store.open(database or Settings().database, read_only=True) as store:
        rows = query(store, where, sort=sort, limit=limit, with_crystals=structures)
    columns = list(SHOWN_COLUMNS)
    frame = pd.DataFrame([[row[name] for name in columns] for row in rows], columns=columns)
    if structures:
        frame["structure"] = pd.Series([to_structure(row["crystal"]) for row in rows], dtype=object)
    return frame
