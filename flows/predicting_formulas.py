"""`gnome predict --formula`: formulas in, from the command line or files, one row each in their order; what is refused says why."""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flows.device import device_of
from flows.hull_table import MOST_BYTES
from flows.settings import Settings
from flows.tables import FORMULA_COLUMNS, column_of
from flows.workspace import current_weights
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formula import MAX_FORMULA_LENGTH, parse_amounts
from gnome.crystals.unpacking import is_packed, unpacked
from gnome.errors import InvalidCrystal, InvalidInput
from gnome.models.formula_ensemble import CompositionalEnsemble
from gnome.quantities import Quantity

Row = dict[str, Any]

ENERGIES = (
    Quantity.E_FORM_PER_ATOM,
    Quantity.E_FORM_UNCERTAINTY,
    Quantity.DECOMPOSITION_ENERGY,
    Quantity.DECOMPOSITION_UNCERTAINTY,
    Quantity.SPREAD,
    Quantity.P_STABLE,
)
"""Columns of an answer, in their order."""
_BESIDE = (Quantity.NO_P_STABLE, Quantity.METHOD, "model", Quantity.NOTE, Quantity.REFUSED)
_ELEMENT = "element: the reference, 0 by convention"
_LONGEST_CELL = 1 << 30
_LONGEST_SHOWN = 1000
_FILES = {".csv", ".txt", ".parquet"}


@dataclass(frozen=True)
class AskedFormula:
    """A formula as it was given, and where; or why none could be read there."""

    label: str
    text: str
    refused: str = ""


def read_formulas(arguments: Sequence[str]) -> Iterator[AskedFormula]:
    """Yield formulas: arguments themselves, lines of text files, and cells of tables that have a column of formulas.

    What cannot be read says why in its place, and the rest is read; raises InvalidInput where that is all there is.
    """
    found = False
    failure: InvalidInput | None = None
    for argument in arguments:
        try:
            for asked in _read(argument):
                found = True
                yield asked
        except InvalidInput as error:
            failure = error
            if len(arguments) > 1 or found:
                yield AskedFormula(_shown(argument), "", str(error))
    if failure is not None and not found:
        raise failure


def _read(argument: str) -> Iterator[AskedFormula]:
    """Read one argument; raises InvalidInput for a file that is missing, cannot be read on, or has no column of formulas."""
    path = Path(argument)
    suffix = (path.with_suffix("") if is_packed(path) else path).suffix.lower()
    if suffix not in _FILES:
        if _exists(argument) and not _is_formula(argument):
            raise InvalidInput(f"{path}: formulas are read from {', '.join(sorted(_FILES))} files, also with .gz")
        yield AskedFormula(_shown(argument), argument)
        return
    try:
        with unpacked(path, MOST_BYTES) as plain:
            cells = _lines(plain) if suffix == ".txt" else _csv_cells(plain) if suffix == ".csv" else _parquet_cells(plain)
            for place, text in cells:
                yield AskedFormula(f"{path}:{place}", text or "", _MORE_CELLS if text is None else "")
    except InvalidCrystal as error:  # of what was to be unpacked
        raise InvalidInput(f"{path}: {error}") from None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read ({error.strerror or error})") from None
    except (csv.Error, pa.ArrowInvalid) as error:
        raise InvalidInput(f"{path}: is no {suffix[1:]} file of formulas ({str(error).splitlines()[0]})") from None


_MORE_CELLS = "the line has more cells than the header; write commas within a cell in quotes"


def _exists(argument: str) -> bool:
    """Whether an argument that may be a formula is the name of a file; longer names than formulas are, are none."""
    return bool(argument) and len(os.fsencode(argument)) <= MAX_FORMULA_LENGTH and Path(argument).exists()


def _shown(text: str) -> str:
    """What no formula can be is not repeated whole."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:20]}... ({len(text)} characters)"


def _is_formula(text: str) -> bool:
    try:
        return bool(parse_amounts(text))
    except InvalidInput:
        return False


def _lines(path: Path) -> Iterator[tuple[int, str | None]]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:  # bytes that are no UTF-8 cost their line alone
        for number, line in enumerate(file, start=1):
            text = line.strip()
            if text and not text.startswith("#"):
                yield number, text


def _csv_cells(path: Path) -> Iterator[tuple[int, str | None]]:
    """Yield line numbers and cells, None for a line that has more cells than the header."""
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, strict=True)  # an open quote would join what follows into one cell
        column = column_of(path, list(reader.fieldnames or ()), FORMULA_COLUMNS)
        line = reader.line_num + 1
        for row in reader:
            yield line, None if None in row else (row[column] or "").strip()
            line = reader.line_num + 1


def _parquet_cells(path: Path) -> Iterator[tuple[int, str | None]]:
    table = pq.ParquetFile(path)
    column = column_of(path, list(table.schema_arrow.names), FORMULA_COLUMNS)
    number = 0
    for batch in table.iter_batches(columns=[column]):
        for cell in batch.column(0).to_pylist():
            yield number, "" if cell is None else str(cell).strip()
            number += 1


def predict_formulas(settings: Settings, arguments: Sequence[str], *, model: Path | None, method: str = "") -> list[Row]:
    """Predict every formula under a method, unless named that of the labels with decomposition energies, if there are any.

    An element is 0 by the project's convention, whatever the networks would say.
    """
    asked = list(read_formulas(arguments))
    ensemble = CompositionalEnsemble.load(model or current_weights(settings, "compositional"), device_of(settings))
    scheme = ensemble.scheme_of(method) if method else ensemble.stability_scheme
    rows: list[Row] = []
    known: list[tuple[Row, dict[int, float]]] = []
    for formula in asked:
        row: Row = {"input": formula.label, "formula": _shown(formula.text)}
        row |= dict.fromkeys((*ENERGIES, *_BESIDE))
        rows.append(row)
        if formula.refused:
            row[Quantity.REFUSED] = f"unreadable: {formula.refused}"
            continue
        try:
            amounts = parse_amounts(formula.text)
        except InvalidInput as error:
            hint = "; there is no file of that name either" if os.sep in formula.text else ""
            row[Quantity.REFUSED] = f"unreadable: {error}{hint}"
            continue
        if len(amounts) == 1:  # no network is asked what is 0 by definition
            row |= {Quantity.E_FORM_PER_ATOM: 0.0, Quantity.DECOMPOSITION_ENERGY: 0.0, Quantity.METHOD: ensemble.schemes[scheme]}
            row |= {Quantity.NOTE: _ELEMENT, Quantity.NO_P_STABLE: "an element competes with nothing: it is its own reference"}
            continue
        if lacking := sorted(set(amounts) - ensemble.elements):
            names = ", ".join(SYMBOLS[z] for z in lacking)
            row[Quantity.REFUSED] = f"unsupported_element: the ensemble was not trained on {names} ({formula.text})"
            continue
        known.append((row, amounts))
    answers = ensemble.answers([amounts for _, amounts in known], scheme=scheme)
    for i, (row, _) in enumerate(known):
        row |= {name: _or_none(getattr(answers, name)[i]) for name in ENERGIES}
        row |= {Quantity.METHOD: answers.method, "model": ensemble.model_id}
        if row[Quantity.P_STABLE] is None:
            row[Quantity.NO_P_STABLE] = f"the ensemble learnt no stability under {answers.method}"
    return rows


def _or_none(value: float) -> float | None:
    return None if value != value else float(value)  # noqa: PLR0124 - NaN where it was not learnt
