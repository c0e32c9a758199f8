"""From shards of crystals to packed inputs with targets, split by the hash of the composition."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import split_bucket
from gnome.crystals.shards import read_shard
from gnome.crystals.validity import check_crystal
from gnome.errors import InvalidCrystal, InvalidInput
from gnome.models.training import FixedInputs, Inputs, Labelled
from gnome.quantities import PLAUSIBLE_E_FORM, Quantity

TRAIN_BUCKETS = range(55)
VALIDATION_BUCKETS = range(55, 60)
TEST_BUCKETS = range(60, 70)


@dataclass(frozen=True)
class Split:
    """Row numbers of one data set by part; rows of buckets 70 to 99 are in none."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def split_by_formula(reduced_formulas: Sequence[str]) -> Split:
    """Split rows by the hash of their reduced formula, so that no composition is in two parts."""
    buckets = np.array([split_bucket(formula) for formula in reduced_formulas], dtype=np.int64)
    parts = (np.flatnonzero(np.isin(buckets, part)) for part in (TRAIN_BUCKETS, VALIDATION_BUCKETS, TEST_BUCKETS))
    return Split(*parts)


def read_labelled_crystals(paths: Sequence[Path]) -> tuple[list[Crystal], NDArray[np.float64]]:
    """Read crystals and their e_form_per_atom from shards.

    Raises InvalidInput when the column is missing or a label is absent, not finite or implausible; the row is named.
    """
    crystals: list[Crystal] = []
    targets: list[float] = []
    for path in paths:
        rows, columns, _ = read_shard(path)
        if Quantity.E_FORM_PER_ATOM not in columns:
            raise InvalidInput(f"{path}: no column {Quantity.E_FORM_PER_ATOM}; labels are needed to train")
        for row, label in enumerate(columns[Quantity.E_FORM_PER_ATOM]):
            is_number = isinstance(label, int | float) and not isinstance(label, bool)
            if not is_number or not PLAUSIBLE_E_FORM[0] <= label <= PLAUSIBLE_E_FORM[1]:
                expected = f"expected a number from {PLAUSIBLE_E_FORM[0]:g} to {PLAUSIBLE_E_FORM[1]:g} eV/atom"
                raise InvalidInput(f"{path}: row {row} has {Quantity.E_FORM_PER_ATOM} = {repr(label)[:60]}, {expected}")
            try:
                check_crystal(rows[row])
            except InvalidCrystal as error:
                raise InvalidInput(f"{path}: row {row}: {error}; leave it out") from None
        crystals += rows
        targets += columns[Quantity.E_FORM_PER_ATOM]
    return crystals, np.array(targets, dtype=np.float64)


def labelled_subset(
    pack: Inputs, targets: NDArray[np.float64], rows: NDArray[np.int64], device: torch.device | str = "cpu"
) -> Labelled:
    """Select rows of packed inputs with their targets, moved to a device."""
    return Labelled(
        _Rows(pack.to(device), torch.from_numpy(rows).to(device)),
        torch.from_numpy(targets[rows]).float().to(device),
    )


@dataclass(frozen=True)
class _Rows:
    """A view of some rows of packed inputs."""

    pack: Inputs
    rows: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: torch.Tensor) -> Any:
        return self.pack.batch(self.rows[indices])

    def fixed(self, batch_size: int, rows: torch.Tensor | None = None) -> "_FixedRows":
        own = self.rows if rows is None else self.rows[rows]
        return _FixedRows(self.pack.fixed(batch_size, own), self.rows)

    def to(self, device: torch.device | str) -> "_Rows":
        return _Rows(self.pack.to(device), self.rows.to(device))


@dataclass(frozen=True)
class _FixedRows:
    """A view of some rows of inputs of fixed shapes."""

    inputs: FixedInputs
    rows: torch.Tensor

    def batch(self, indices: torch.Tensor) -> Any:
        return self.inputs.batch(self.rows[indices])

    def fits(self, order: torch.Tensor) -> list[bool]:
        return self.inputs.fits(self.rows[order])
