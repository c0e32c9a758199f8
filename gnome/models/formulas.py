"""Formulas as networks take them: padded, so that nothing has a shape that depends on what is in a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from operator import methodcaller
from typing import Self

import numpy as np
import torch
from torch import Tensor

from gnome.errors import InvalidInput


@dataclass(frozen=True)
class FormulaBatch:
    """Formulas as sets of elements: atomic_numbers, fractions (B, most elements), 0 where unused; scheme (B,)."""

    atomic_numbers: Tensor
    fractions: Tensor
    scheme: Tensor

    def jittered(self, noise: Tensor) -> Self:
        """Multiply amounts by exp(noise), noise (B, most elements), and divide by their sum again."""
        amounts = self.fractions * noise.exp()
        return replace(self, fractions=amounts / amounts.sum(1, keepdim=True))


@dataclass(frozen=True)
class PackedFormulas:
    """Many formulas in padded tensors: atomic_numbers, fractions (n, most elements), 0 where unused; scheme (n,)."""

    atomic_numbers: Tensor
    fractions: Tensor
    scheme: Tensor

    @classmethod
    def from_compositions(cls, compositions: Sequence[Mapping[int, float]], scheme: Sequence[int] | None = None) -> Self:
        """Pack amounts by atomic number, of which only proportions count; `scheme`: index of the label scheme of each, else 0."""
        sizes = np.fromiter(map(len, compositions), np.int64, len(compositions))
        n = int(sizes.sum())
        z = np.fromiter(chain.from_iterable(compositions), np.int64, n)
        amounts = np.fromiter(chain.from_iterable(map(methodcaller("values"), compositions)), np.float64, n)
        rows = np.repeat(np.arange(len(compositions)), sizes)
        totals = np.bincount(rows, amounts, len(compositions))
        if (wrong := np.flatnonzero(~((totals > 0) & (totals < np.inf)))).size:
            raise InvalidInput(f"composition {dict(compositions[wrong[0]])} has no atoms, or infinitely many")
        order = np.lexsort((z, rows))  # elements by number, each formula's where they are
        columns = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        shape = len(compositions), max(int(sizes.max(initial=0)), 1)
        numbers, fractions = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        numbers[rows, columns] = z[order]
        fractions[rows, columns] = (amounts / totals[rows])[order]
        schemes = np.zeros(len(compositions), np.int64) if scheme is None else np.array(scheme, np.int64)
        return cls(torch.from_numpy(numbers), torch.from_numpy(fractions), torch.from_numpy(schemes))

    def __len__(self) -> int:
        """Number of formulas."""
        return len(self.scheme)

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors."""
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))

    def batch(self, indices: Tensor) -> FormulaBatch:
        """Select formulas (B,)."""
        return FormulaBatch(self.atomic_numbers[indices], self.fractions[indices], self.scheme[indices])

    def fixed(self, batch_size: int, _rows: Tensor | None = None) -> "FixedFormulas":
        """Return the formulas in batches of one shape, as all of `batch_size` are."""
        return FixedFormulas(self, batch_size)

    def by_size(self, most: int) -> list[tuple[Tensor, FormulaBatch]]:
        """Return rows and batches of at most `most` formulas that have equally many elements each, without padding."""
        sizes = (self.atomic_numbers > 0).sum(1)
        batches = []
        for size in sizes.unique().tolist():
            for rows in torch.nonzero(sizes == size)[:, 0].split(most):
                whole = self.batch(rows)
                batches.append((rows, FormulaBatch(whole.atomic_numbers[:, :size], whole.fractions[:, :size], whole.scheme)))
        return batches


@dataclass(frozen=True)
class FixedFormulas:
    """Formulas in batches of one size, which have one shape."""

    pack: PackedFormulas
    batch_size: int

    def batch(self, indices: Tensor) -> FormulaBatch:
        """Select formulas (B,)."""
        return self.pack.batch(indices)

    def fits(self, order: Tensor) -> list[bool]:
        """All batches but a smaller last one."""
        return [len(rows) == self.batch_size for rows in order.split(self.batch_size)]
