"""Screening in looks: few members and volumes for all candidates first, the full filter for the few that can still be chosen.

A budget buys the best compositions alone, one structure each, so a candidate that a cheap look puts far behind them need not be looked at
closely.  What a look keeps is counted in compositions, and of each composition only structures near its best go on.  How much of the full
filter's choice that keeps, and how much it saves, is measured by `benchmarks/structural_screening.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gnome.errors import InvalidInput
from pipelines.screening import ScreeningSettings

Energies = Callable[[Sequence[int], int, ScreeningSettings], NDArray[np.float64]]
"""Decomposition energies, eV/atom, of candidates by their places, so many members looking at these volumes."""

NEAR_BEST = 0.1
"""How far above its composition's best structure, eV/atom, a structure may be seen by a look to be looked at again."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """So many members at these volumes; `kept` compositions for each that the budget buys go on."""

    members: int
    volumes: ScreeningSettings
    kept: float

    def __post_init__(self) -> None:
        """Refuse what is no look."""
        if self.members < 1 or self.kept < 1:
            raise InvalidInput(
                f"a look of {self.members} members that keeps {self.kept:g} times the budget, expected 1 or more of each"
            )


FIRST_LOOK = Look(members=1, volumes=ScreeningSettings(n_scales=1, smallest_scale=1.0, largest_scale=1.0), kept=20.0)
"""The volume as it was guessed; one member looks."""

SECOND_LOOK = Look(members=3, volumes=ScreeningSettings(n_scales=3, smallest_scale=0.9, largest_scale=1.1), kept=3.0)


def best_structures(energies: ArrayLike, compositions: Sequence[str], n: int, *, within: float = NEAR_BEST) -> list[int]:
    """Return places of the structures near the lowest of each of the n best compositions, by energy, places within equals.

    `energies` are decomposition energies, eV/atom; those that are not numbers come last.
    """
    values = np.asarray(energies, dtype=np.float64)
    best: dict[str, float] = {}
    found: list[int] = []
    for i in np.lexsort((np.arange(len(values)), values)).tolist():
        name = compositions[i]
        if name not in best and len(best) == n:
            continue
        lowest = best.setdefault(name, float(values[i]))
        if values[i] <= lowest + within or np.isnan(lowest):
            found.append(i)
    return found


def passed_looks(
    energies: Energies, compositions: Sequence[str], budget: int, *, looks: Sequence[Look] = (FIRST_LOOK, SECOND_LOOK)
) -> list[int]:
    """Return places of the structures that get the full filter; `compositions` are reduced formulas."""
    left: list[int] = list(range(len(compositions)))
    for look in looks:
        found = energies(left, look.members, look.volumes)
        left = [left[i] for i in best_structures(found, [compositions[i] for i in left], int(look.kept * budget))]
    return left
