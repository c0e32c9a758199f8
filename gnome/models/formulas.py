"""Formulas as networks take them: padded, so that nothing has a shape that depends on what is in a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor


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
        most = max((len(composition) for composition in compositions), default=1)
        numbers = np.zeros((len(compositions), most), dtype=np.int64)
        fractions = np.zeros((len(compositions), most), dtype=np.float32)
        for row, composition in enumerate(compositions):
            total = sum(composition.values())
            for column, (z, amount) in enumerate(sorted(composition.items())):
                numbers[row, column] = z
                fractions[row, column] = amount / total
        schemes = (
            torch.zeros(len(compositions), dtype=torch.long) if scheme is None else torch.tensor(list(scheme), dtype=torch.long)
        )
        return cls(torch.from_numpy(numbers), torch.from_numpy(fractions), schemes)

    def __len__(self) -> int:
        """Number of formulas."""
        return len(self.scheme)

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors."""
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))

    def batch(self, indices: Tensor) -> FormulaBatch:
        """Select formulas (B,)."""
        return FormulaBatch(self.atomic_numbers[indices], self.fractions[indices], self.scheme[indices])

    def by_size(self, most: int) -> list[tuple[Tensor, FormulaBatch]]:
        """Return rows and batches of at most `most` formulas that have equally many elements each, without padding."""
        sizes = (self.atomic_numbers > 0).sum(1)
        batches = []
        for size in sizes.unique().tolist():
            for rows in torch.nonzero(sizes == size)[:, 0].split(most):
                whole = self.batch(rows)
                batches.append((rows, FormulaBatch(whole.atomic_numbers[:, :size], whole.fractions[:, :size], whole.scheme)))
        return batches
