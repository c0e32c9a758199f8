"""Labelled formulas from shards of crystals, or from tables of formulas."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gnome.crystals.formula import parse_formula, reduced_formula
from gnome.errors import InvalidInput
from gnome.models.compositional import TARGETS
from gnome.models.datasets import read_labelled_crystals
from gnome.models.formulas import PackedFormulas
from gnome.quantities import PLAUSIBLE_E_FORM, Quantity


@dataclass(frozen=True)
class LabelledFormulas:
    """Reduced formulas and their labels (n, targets), eV/atom, NaN where one is not known."""

    formulas: list[str]
    targets: NDArray[np.float64]

    def pack(self) -> PackedFormulas:
        """Pack them as networks take them."""
        return PackedFormulas.from_compositions([parse_formula(formula) for formula in self.formulas])


def read_labelled_formulas(paths: Sequence[Path]) -> LabelledFormulas:
    """Read the lowest energies of every formula.

    A file is a shard of crystals, or a table with the columns reduced_formula and e_form_per_atom or decomposition_energy or both.
    Raises InvalidInput naming file and row when a formula or a label cannot be used, or a row has no label.
    """
    return lowest_labels(row for path in paths for row in _rows_of(path))


def lowest_labels(rows: Iterable[tuple[str, NDArray[np.float64]]]) -> LabelledFormulas:
    """Keep the lowest of each label (targets,) that a formula comes with."""
    lowest: dict[str, NDArray[np.float64]] = {}
    for formula, labels in rows:
        lowest[formula] = np.fmin(labels, lowest.get(formula, labels))
    formulas = sorted(lowest)
    return LabelledFormulas(formulas, np.array([lowest[formula] for formula in formulas]).reshape(-1, len(TARGETS)))


def _rows_of(path: Path) -> list[tuple[str, NDArray[np.float64]]]:
    try:
        names = pq.read_schema(path).names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidInput(f"{path}: has several columns named {', '.join(twice)}; keep one")
        wanted = [str(name) for name in (Quantity.REDUCED_FORMULA, *TARGETS) if name in names]
        rows = pq.read_table(path, columns=wanted).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InvalidInput(
            f"{path}: cannot be read as Parquet, which training tables are ({str(error).splitlines()[0]})"
        ) from None
    if "lattice" in names:
        crystals, _ = read_labelled_crystals([path])
        return [
            (crystal.reduced_formula, _labels(f"{path}: row {number} ({crystal.reduced_formula})", row))
            for number, (crystal, row) in enumerate(zip(crystals, rows, strict=True))
        ]
    if Quantity.REDUCED_FORMULA not in names or len(wanted) == 1:
        raise InvalidInput(f"{path}: needs {Quantity.REDUCED_FORMULA} and {' or '.join(TARGETS)}; it has {', '.join(names)}")
    return [checked_row(f"{path}: row {number}", row) for number, row in enumerate(rows)]


def checked_row(place: str, row: dict[str, object]) -> tuple[str, NDArray[np.float64]]:
    """Return the reduced formula of a row and its labels (targets,); raises InvalidInput naming the place."""
    try:
        formula = reduced_formula(parse_formula(str(row[Quantity.REDUCED_FORMULA] or "")))
    except InvalidInput as error:
        raise InvalidInput(f"{place}: {error}") from None
    return formula, _labels(f"{place} ({formula})", row)


def _labels(place: str, row: dict[str, object]) -> NDArray[np.float64]:
    labels = np.full(len(TARGETS), np.nan)
    for column, name in enumerate(TARGETS):
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidInput(f"{place} has {name} = {value!r}, which is no number")
        if not PLAUSIBLE_E_FORM[0] <= value <= PLAUSIBLE_E_FORM[1]:
            raise InvalidInput(f"{place} has {name} = {value}, not a plausible label")
        labels[column] = value
    if np.isnan(labels).all():
        raise InvalidInput(f"{place} has no label; leave it out")
    return labels
