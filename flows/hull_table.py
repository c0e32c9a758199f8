"""A hull from a table of formulas and formation energies, for whoever has one of his own."""

import csv
import gzip
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gnome.crystals.formula import parse_formula
from gnome.errors import InvalidInput
from gnome.quantities import PLAUSIBLE_E_FORM, Quantity
from gnome.stability.hull import ConvexHull, HullEntry

FORMULA_COLUMNS = ("formula", str(Quantity.REDUCED_FORMULA), "composition")
"""Names under which a table may hold its formulas."""


def read_hull(path: Path, method: str) -> ConvexHull:
    """Read a table (.csv, .csv.gz or .parquet) with formulas and e_form_per_atom, eV/atom, as a hull of a method.

    Raises InvalidInput naming file and row where it cannot be used: where a column `method` names another, or an element is below 0,
    as where energies are not those of formation.
    """
    hull = ConvexHull(method)
    for row in _rows(path):
        try:
            hull.add([_entry(row, method)])
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {row.place}: {error}") from None
    if not hull.entries:
        raise InvalidInput(f"{path}: holds no phases")
    return hull


@dataclass(frozen=True)
class _Row:
    """A phase as a table gives it, and where."""

    place: str
    formula: str
    energy: Any
    method: str


def _entry(row: _Row, method: str) -> HullEntry:
    if row.method not in {"", method}:
        raise InvalidInput(
            f"{row.formula} is of method {row.method}, the ensemble predicts {method}; energies of two methods never meet"
        )
    try:
        energy = float(row.energy) if not isinstance(row.energy, bool) else math.nan
    except (TypeError, ValueError):
        energy = math.nan
    low, high = PLAUSIBLE_E_FORM
    if not low <= energy <= high:
        raise InvalidInput(
            f"{Quantity.E_FORM_PER_ATOM} of {row.formula} is {row.energy!r}, expected a number from {low:g} to {high:g} eV/atom"
        )
    composition = parse_formula(row.formula)
    if len(composition) == 1 and energy < -_ELEMENT_TOLERANCE:
        raise InvalidInput(
            f"{row.formula} has a formation energy of {energy:g} eV/atom, an element's is 0; are these total energies? "
            "If not, leave the row out"
        )
    return HullEntry(id=row.place, composition=composition, e_form_per_atom=energy)


_ELEMENT_TOLERANCE = 1e-3
"""How far below 0 an element may be, eV/atom: tables are rounded."""


def column_of(path: Path, names: list[str], wanted: tuple[str, ...]) -> str:
    """Find a column by any of its names, spaces and case aside; raises InvalidInput where there is none, or several."""
    for name in wanted:
        found = [own for own in names if own.strip().lower() == name]
        if len(found) > 1:
            raise InvalidInput(f"{path}: has {len(found)} columns named {name}; keep one")
        if found:
            return found[0]
    raise InvalidInput(f"{path}: no column {' or '.join(wanted)}; it has {', '.join(names) or 'none'}")


def _rows(path: Path) -> Iterator[_Row]:
    """Yield phases; everything in a CSV is text, so that sodium nitride stays NaN."""
    energy_column, method_column = str(Quantity.E_FORM_PER_ATOM), str(Quantity.METHOD)
    try:
        names, rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _csv_rows(path)
        formula, energy = (column_of(path, names, wanted) for wanted in (FORMULA_COLUMNS, (energy_column,)))
        method = next((name for name in names if name.strip().lower() == method_column), None)
        for place, row in rows:
            named = row.get(method) if method is not None else None
            yield _Row(place, str(row[formula] or "").strip(), row[energy], str(named or "").strip())
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise InvalidInput(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})") from None


def _parquet_rows(path: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, Any]]]]:
    table = pq.read_table(path)
    return list(table.column_names), ((f"row {number}", row) for number, row in enumerate(table.to_pylist()))


def _csv_rows(path: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, Any]]]]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    reader = csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline=""), strict=True)

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for row in reader:
            if None in row:
                raise InvalidInput(
                    f"{path}: line {reader.line_num} has more cells than the header; write commas within a cell in quotes"
                )
            yield f"line {reader.line_num}", row

    return list(reader.fieldnames or ()), rows()
