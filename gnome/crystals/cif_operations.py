"""Symmetry operations of a CIF: read from `x, -y, z+1/2` and the like, held against the cell, and checked to be a group."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gnome.errors import InvalidCrystal

METRIC_TOLERANCE: Final = 0.02
"""How far an operation may change lengths and angles, relative to the lengths concerned: cells are written with few digits."""

_GRID: Final = 24  # translations of space groups in their usual cells are multiples of 1/24
_TERM: Final = re.compile(r"([+-]?)(?:(\d+)/(\d+)|(\d+\.?(\d*)|\.(\d+))|([xyz]))")


@dataclass(frozen=True, eq=False)
class Operations:
    """Distinct operations, the identity first: integer rotations (n, 3, 3) and translations (n, 3) on fractional coordinates."""

    rotations: NDArray[np.int64]
    translations: NDArray[np.float64]

    def __len__(self) -> int:
        """Number of operations."""
        return len(self.rotations)

    def fit(self, metric: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of the operations (n) leave a cell with this metric tensor (3, 3) as it is."""
        change = np.abs(np.swapaxes(self.rotations, 1, 2) @ metric @ self.rotations - metric)
        lengths = np.sqrt(np.diag(metric))
        return np.asarray((change <= METRIC_TOLERANCE * np.outer(lengths, lengths)).all(axis=(1, 2)))


@lru_cache(maxsize=256)
def read_operations(texts: tuple[str, ...]) -> Operations:
    """Read operations as a file lists them.

    The identity is added where it is left out; an operation listed twice counts once.
    Raises InvalidCrystal with reason `malformed` for what is no operation, and for a list that is no group: one that is cut short.
    """
    rotations, translations = [], []
    for text in ("x,y,z", *texts):
        rows = [_row(part) for part in re.sub(r"\s", "", text).lower().split(",")]
        found = [row for row in rows if row is not None]
        if len(found) != 3 or len(rows) != 3 or abs(round(np.linalg.det([row[0] for row in found]))) != 1:
            raise InvalidCrystal("malformed", f"{text[:60]!r} is no symmetry operation of the cell")
        rotations.append([row[0] for row in found])
        translations.append([row[1] for row in found])
    return _group(np.array(rotations, dtype=np.int64), np.array(translations))


@lru_cache(maxsize=4096)
def _row(text: str) -> tuple[tuple[int, int, int], float] | None:
    """One of the three parts of an operation: factors of x, y and z, and the shift; None where it is not understood."""
    factors, shift, place = {"x": 0, "y": 0, "z": 0}, None, 0
    while place < len(text):
        term = _TERM.match(text, place)
        if term is None or (place and not term[1]):
            return None
        place, sign = term.end(), -1 if term[1] == "-" else 1
        if term[7]:
            if factors[term[7]]:
                return None
            factors[term[7]] = sign
        elif shift is not None or (term[3] and int(term[3]) == 0):
            return None
        else:
            shift = sign * (int(term[2]) / int(term[3]) if term[3] else _on_grid(float(term[4]), len(term[5] or term[6] or "")))
    return ((factors["x"], factors["y"], factors["z"]), shift or 0.0) if any(factors.values()) else None


def _on_grid(value: float, digits: int) -> float:
    """A shift written with few digits as the fraction it stands for: 0.33 or 0.3333 is 1/3."""
    nearest = round(value * _GRID) / _GRID
    return nearest if abs(value - nearest) <= min(max(0.7 * 10.0**-digits, 1e-6), 0.005) else value


def _group(rotations: NDArray[np.int64], translations: NDArray[np.float64]) -> Operations:
    """Distinct operations, checked to be closed: of every two, one after the other is there too."""
    keys = _keys(rotations, translations, 0.0)
    _, first = np.unique(keys, return_index=True)
    first = np.sort(first)
    rotations, translations = rotations[first], translations[first]
    known = [set(_keys(rotations, translations, offset).tolist()) for offset in (0.0, 0.5)]
    for rotation, translation in zip(rotations, translations, strict=True):
        product, shift = rotation @ rotations, translations @ rotation.T + translation
        by_offset = [_keys(product, shift, offset).tolist() for offset in (0.0, 0.5)]
        if not all(one in known[0] or other in known[1] for one, other in zip(*by_offset, strict=True)):
            raise InvalidCrystal(
                "malformed", f"the {len(first)} symmetry operations are no group, some are missing or wrong; list all of them"
            )
    return Operations(rotations, translations)


def _keys(rotations: NDArray[np.int64], translations: NDArray[np.float64], offset: float) -> NDArray[np.int64]:
    """A number for each operation, the same for shifts within a few thousandths (or, near a bound, under the other offset)."""
    rounded = np.floor(translations % 1.0 * 240 + 0.5 + offset).astype(np.int64) % 240
    digits = np.concatenate([np.clip(rotations.reshape(-1, 9), -2, 2) + 2, rounded], axis=1)
    weights = np.array([*(5 ** np.arange(9, dtype=np.int64)), *(5**9 * 240 ** np.arange(3, dtype=np.int64))])
    return np.asarray(digits @ weights)


def triplets(operations: Operations) -> Iterable[str]:
    """Operations as a CIF lists them."""
    for rotation, translation in zip(operations.rotations, operations.translations, strict=True):
        yield ", ".join(_part(row, shift) for row, shift in zip(rotation, translation, strict=True))


def _part(factors: NDArray[np.int64], shift: float) -> str:
    text = "".join(f"{'+' if factor > 0 else '-'}{name}" for name, factor in zip("xyz", factors, strict=True) if factor)
    whole = round(shift % 1.0 * _GRID)
    if abs(shift % 1.0 - whole / _GRID) < 1e-6:
        fraction = whole % _GRID
        common = np.gcd(fraction, _GRID)
        behind = f"+{fraction // common}/{_GRID // common}" if fraction else ""
    else:
        behind = f"+{shift % 1.0:.10f}"
    return text.removeprefix("+") + behind
