"""Screening in looks: few members and volumes for all candidates first, the full filter for the few that can still be chosen.

A budget buys the best compositions alone, one structure each, so a candidate that a cheap look puts far behind them need not be looked at
closely, nor one that it puts far behind the best structure of its own composition.  What goes on is counted in compositions.

Of compositions that no network knows well, one member now and then says half an eV/atom too much.  The median over all members does not
mind, but a look by few would lose these; so a look by few goes by the most hopeful of them, and lets a composition's structures pass that
it puts well above the best.  How much of the full filter's choice all that keeps, and how much it saves, is measured by
`benchmarks/structural_screening.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gnome.crystals.crystal import Crystal
from gnome.errors import InvalidInput
from gnome.models.calibration import ErrorCalibration
from gnome.models.energy_model import EnergyModel
from gnome.models.ensemble import StructuralEnsemble
from pipelines.screening import ScreeningSettings

OverMembers = Literal["median", "lowest"]


@dataclass(frozen=True, kw_only=True)
class Look:
    """At most so many members at these volumes, of whose energies the median or the lowest counts.

    `kept` compositions for each that the budget buys go on, with their structures up to `within` eV/atom above the best of them.
    """

    members: int
    over_members: OverMembers
    volumes: ScreeningSettings
    kept: float
    within: float

    def __post_init__(self) -> None:
        """Refuse what is no look."""
        if self.over_members not in get_args(OverMembers):
            raise InvalidInput(f"over_members is {self.over_members!r}, expected {' or '.join(get_args(OverMembers))}")
        if self.members < 1 or self.kept < 1:
            raise InvalidInput(
                f"a look of {self.members} members that keeps {self.kept:g} times the budget, expected 1 or more of each"
            )


AS_GUESSED = ScreeningSettings(n_scales=1)
"""The volume as it was guessed, alone: the mean over others differs little from what networks say there."""

FIRST_LOOK = Look(members=2, over_members="lowest", volumes=AS_GUESSED, kept=10.0, within=0.4)
SECOND_LOOK = Look(members=4, over_members="lowest", volumes=AS_GUESSED, kept=3.0, within=0.2)
THIRD_LOOK = Look(members=1000, over_members="median", volumes=AS_GUESSED, kept=1.2, within=0.03)
LOOKS = (FIRST_LOOK, SECOND_LOOK, THIRD_LOOK)

Energies = Callable[[Sequence[int], Look], NDArray[np.float64]]
"""Decomposition energies, eV/atom, of candidates by their places, as a look sees them."""


@dataclass(frozen=True)
class MostHopeful:
    """Implements `EnergyModel` with the lowest energy that any member of a model says."""

    model: EnergyModel

    @property
    def model_id(self) -> str:
        """The model's."""
        return self.model.model_id

    @property
    def method(self) -> str:
        """The model's."""
        return self.model.method

    @property
    def elements(self) -> frozenset[int]:
        """The model's."""
        return self.model.elements

    @property
    def calibration(self) -> ErrorCalibration | None:
        """None: how far the lowest is off was not measured."""
        return None

    def member_energies(self, crystals: Sequence[Crystal], volume_scales: Sequence[float] = (1.0,)) -> NDArray[np.float64]:
        """Predict eV/atom, shape (1, volume scales, crystals)."""
        return self.model.member_energies(crystals, volume_scales).min(axis=0, keepdims=True)


def looking(ensemble: StructuralEnsemble, look: Look) -> EnergyModel:
    """Return the part of an ensemble that takes a look."""
    some = replace(ensemble, members=ensemble.members[: look.members])
    return MostHopeful(some) if look.over_members == "lowest" else some


def go_on(
    energies: ArrayLike, compositions: Sequence[str], n: int, *, within: float, doubtful: Sequence[bool] | None = None
) -> list[int]:
    """Return places of the structures near the lowest of each of the n best compositions, filled up to n by the next best structures.

    `energies` are decomposition energies, eV/atom; those that are not numbers come last, and what is `doubtful` behind all that is not.
    By energy, places within equals, what fills up behind all others.
    """
    values = np.asarray(energies, dtype=np.float64)
    last = np.zeros(len(values), dtype=bool) if doubtful is None else np.asarray(doubtful, dtype=bool)
    lowest: dict[str, float] = {}
    near: list[int] = []
    others: list[int] = []
    for i in np.lexsort((values, last)).tolist():  # stable; NaN comes last
        if compositions[i] not in lowest and len(lowest) == n:
            others.append(i)
            continue
        best = lowest.setdefault(compositions[i], float(values[i]))
        (near if values[i] <= best + within or np.isnan(best) else others).append(i)
    return near + others[: max(0, n - len(near))]


def best_of_compositions(energies: ArrayLike, compositions: Sequence[str], n: int) -> list[int]:
    """Return places of the lowest structure of each of the n best compositions."""
    values = np.asarray(energies, dtype=np.float64)
    best: dict[str, int] = {}
    for i in np.argsort(values, kind="stable").tolist():
        best.setdefault(compositions[i], i)
    return list(best.values())[:n]


def passed_looks(energies: Energies, compositions: Sequence[str], budget: int, *, looks: Sequence[Look] = LOOKS) -> list[int]:
    """Return places of the structures that get the full filter; `compositions` are reduced formulas."""
    left: list[int] = list(range(len(compositions)))
    for look in looks:
        found = energies(left, look)
        left = [left[i] for i in go_on(found, [compositions[i] for i in left], ceil(look.kept * budget), within=look.within)]
    return left
