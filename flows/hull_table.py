"""A hull from a table of formulas and formation energies, for whoever has one of his own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from gnome.crystals.formula import parse_formula
from gnome.errors import InvalidInput
from gnome.quantities import Quantity
from gnome.stability.hull import ConvexHull, HullEntry

FORMULA_COLUMNS = ("formula", str(Quantity.REDUCED_FORMULA), "composition")
"""Names under which a table may hold its formulas."""


def read_hull(path: Path, method: str) -> ConvexHull:
    """Read a table (.csv, .csv.gz or .parquet) with formulas and e_form_per_atom, eV/atom, as a hull of a method.

    Raises InvalidInput naming file and row where it cannot be used.
    """
    hull = ConvexHull(method)
    for place, formula, energy in _rows(path):
        try:
            if isinstance(energy, bool) or not isinstance(energy, int | float):
                raise InvalidInput(f"{Quantity.E_FORM_PER_ATOM} is {energy!r}, which is no number")  # noqa: TRY301 - told with its place
            hull.add([HullEntry(id=place, composition=parse_formula(formula), e_form_per_atom=float(energy))])
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {place}: {error}") from None
    if not hull.entries:
        raise InvalidInput(f"{path}: holds no phases")
    return hull


def column_of(path: Path, names: list[str], wanted: tuple[str, ...]) -> str:
    """Find a column by any of its names, spaces and case aside; raises InvalidInput where there is none, or several."""
    for name in wanted:
        found = [own for own in names if own.strip().lower() == name]
        if len(found) > 1:
            raise InvalidInput(f"{path}: has {len(found)} columns named {name}; keep one")
        if found:
            return found[0]
    raise InvalidInput(f"{path}: no column {' or '.join(wanted)}; it has {', '.join(names) or 'none'}")


def _rows(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Yield where a phase stands, its formula and its energy."""
    of_parquet = path.suffix.lower() == ".parquet"
    try:
        table = pq.read_table(path) if of_parquet else csv.read_csv(path)
    except (OSError, pa.ArrowException) as error:
        raise InvalidInput(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})") from None
    names = list(table.column_names)
    formulas, energies = (
        table.column(column_of(path, names, wanted)).to_pylist() for wanted in (FORMULA_COLUMNS, (str(Quantity.E_FORM_PER_ATOM),))
    )
    for number, (formula, energy) in enumerate(zip(formulas, energies, strict=True)):
        place = f"row {number}" if of_parquet else f"line {number + 2}"
        yield place, "" if formula is None else str(formula), energy
