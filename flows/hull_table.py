"""A hull from a table of formulas and formation energies, for whoever has one of his own."""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flows.progress import Listener, Silent
from flows.tables import E_FORM_COLUMNS, FORMULA_COLUMNS, column_of, find_column
from gnome.crystals.formula import parse_formula
from gnome.crystals.unpacking import unpacked
from gnome.errors import InvalidCrystal, InvalidInput
from gnome.quantities import PLAUSIBLE_E_FORM, Quantity
from gnome.stability.hull import ConvexHull, HullEntry

MOST_BYTES = 1 << 30
"""Of a table that is unpacked."""
_SILENT = Silent()


def read_hull(path: Path, method: str, listener: Listener = _SILENT) -> ConvexHull:
    """Read a table (.csv or .parquet, or such as .gz) with formulas and e_form_per_atom, eV/atom, as a hull of a method.

    A row that puts an element below 0 is reported and counted as 0.  But where no row of an element is at 0 or above and one lies deeper
    than 0.1 eV/atom, the energies look like total ones, and the table is refused.  Raises InvalidInput naming file and row for that and
    whatever else cannot be used, such as a column `method` that names another.
    """
    hull = ConvexHull(method)
    odd: list[tuple[_Row, float]] = []
    some_at_zero = False
    for row in _rows(path):
        try:
            entry, energy = _entry(row, method)
            hull.add([entry])
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {row.place}: {error}") from None
        if len(entry.composition) == 1:
            some_at_zero |= entry.e_form_per_atom == energy and not set(entry.composition) & _NOBLE
            odd += [(row, energy)] if entry.e_form_per_atom != energy else []
    if not hull.entries:
        raise InvalidInput(f"{path}: holds no phases")
    if odd:
        row, energy = min(odd, key=lambda pair: (math.isnan(pair[1]), pair[1]))
        if not some_at_zero and energy < -_OTHER_REFERENCE:
            raise InvalidInput(
                f"{path}: {row.place}: {row.formula} has a formation energy of {energy:g} eV/atom, an element's is 0; are these total "
                "energies? If not, leave the row out"
            )
        named = ", ".join(f"{row.formula} {row.energy} ({row.place})" for row, _ in odd[:5])
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        listener.say(
            f"{path}: elements count as 0 eV/atom, also those that the table has elsewhere: {named}{more}; check these rows"
        )
    return hull


@dataclass(frozen=True)
class _Row:
    """A phase as a table gives it, and where."""

    place: str
    formula: str
    energy: Any
    method: str


def _entry(row: _Row, method: str) -> tuple[HullEntry, float]:
    """Make the entry of a row, an element's at 0 where it has no better place, and read its energy as it stands there."""
    if row.method not in {"", method}:
        raise InvalidInput(
            f"{row.formula} is of method {row.method}, the ensemble predicts {method}; energies of two methods never meet"
        )
    try:
        energy = float(row.energy) if not isinstance(row.energy, bool) else math.nan
    except (TypeError, ValueError):
        energy = math.nan
    low, high = PLAUSIBLE_E_FORM
    composition = parse_formula(row.formula)
    if len(composition) == 1 and not -_ELEMENT_TOLERANCE <= energy <= high:
        return HullEntry(id=row.place, composition=composition, e_form_per_atom=0.0), energy
    if not low <= energy <= high:
        raise InvalidInput(
            f"{Quantity.E_FORM_PER_ATOM} of {row.formula} is {row.energy!r}, expected a number from {low:g} to {high:g} eV/atom"
        )
    return HullEntry(id=row.place, composition=composition, e_form_per_atom=energy), energy


_ELEMENT_TOLERANCE = 1e-3
"""How far below 0 an element may be, eV/atom: tables are rounded."""
_OTHER_REFERENCE = 0.1
"""How far below 0 a better form of an element may lie, eV/atom; total energies of elements but noble gases are deeper."""
_NOBLE = frozenset({2, 10, 18, 36, 54, 86})


def _rows(path: Path) -> Iterator[_Row]:
    """Yield phases; everything in a CSV is text, so that sodium nitride stays NaN."""
    try:
        with unpacked(path, MOST_BYTES) as plain:
            names, rows = _parquet_rows(plain) if plain.suffix.lower() == ".parquet" else _csv_rows(plain)
            formula, energy = (column_of(path, names, wanted) for wanted in (FORMULA_COLUMNS, E_FORM_COLUMNS))
            method = find_column(path, names, (str(Quantity.METHOD),))
            for place, row in rows:
                named = row.get(method) if method is not None else None
                yield _Row(place, str(row[formula] or "").strip(), row[energy], str(named or "").strip())
    except InvalidCrystal as error:  # of what was to be unpacked
        raise InvalidInput(f"{path}: {error}") from None
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise InvalidInput(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})") from None


def _parquet_rows(path: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, Any]]]]:
    table = pq.read_table(path)
    return list(table.column_names), ((f"row {number}", row) for number, row in enumerate(table.to_pylist()))


def _csv_rows(path: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, Any]]]]:
    reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for row in reader:
            if None in row:
                raise InvalidInput(
                    f"{path}: line {reader.line_num} has more cells than the header; write commas within a cell in quotes"
                )
            yield f"line {reader.line_num}", row

    return list(reader.fieldnames or ()), rows()
