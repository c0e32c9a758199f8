"""Labelled formulas from shards of crystals, or from tables of formulas."""

from collections.abc import Sequence
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
    lowest: dict[str, NDArray[np.float64]] = {}
    for path in paths:
        for formula, labels in _rows_of(path):
            lowest[formula] = np.fmin(labels, lowest.get(formula, labels))
    formulas = sorted(lowest)
    return LabelledFormulas(formulas, np.array([lowest[formula] for formula in formulas]).reshape(-1, len(TARGETS)))


def _rows_of(path: Path) -> list[tuple[str, NDArray[np.float64]]]:
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowInvalid) as error:
        raise InvalidInput(f"{path}: cannot be read as Parquet ({error})") from None
    if "lattice" in names:
        crystals, energies = read_labelled_crystals([path])
        return [(crystal.reduced_formula, np.array([energy, np.nan])) for crystal, energy in zip(crystals, energies, strict=True)]
    labels = [str(name) for name in TARGETS if name in names]
    if Quantity.REDUCED_FORMULA not in names or not labels:
        raise InvalidInput(f"{path}: needs {Quantity.REDUCED_FORMULA} and {' or '.join(TARGETS)}; it has {', '.join(names)}")
    table = pq.read_table(path, columns=[str(Quantity.REDUCED_FORMULA), *labels]).to_pylist()
    return [_checked(path, number, row) for number, row in enumerate(table)]


def _checked(path: Path, number: int, row: dict[str, object]) -> tuple[str, NDArray[np.float64]]:
    try:
        formula = reduced_formula(parse_formula(str(row[Quantity.REDUCED_FORMULA] or "")))
    except InvalidInput as error:
        raise InvalidInput(f"{path}: row {number}: {error}") from None
    values = []
    for name in TARGETS:
        value = row.get(name)
        number_ = float(value) if isinstance(value, int | float) else float("nan")
        if value is not None and not PLAUSIBLE_E_FORM[0] <= number_ <= PLAUSIBLE_E_FORM[1]:
            raise InvalidInput(f"{path}: row {number} ({formula}) has {name} = {value}, not a plausible label")
        values.append(number_)
    if all(value != value for value in values):  # noqa: PLR0124 - NaN
        raise InvalidInput(f"{path}: row {number} ({formula}) has no label; leave it out")
    return formula, np.array(values)
