"""What speaks against a candidate beside its energy; the one place where that is decided.

A candidate about which something is in doubt is evaluated after all others, whatever its predicted energy, and a crystal that was found
is shown apart.  Nothing here makes a candidate better than its energy does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

FORMULA_THRESHOLD: Final = 0.3
"""Below this probability a formula is held to be unstable.

On CritExam's validation file (12,752 formulas of the Materials Project) this loses 9.8 % of the stable formulas and catches 92 % of those
that lie more than 0.1 eV/atom above the others' hull; a lower one loses less and catches less.
"""

LOOK_THRESHOLD: Final = FORMULA_THRESHOLD / 2
"""The same for a look by few networks, which are less sure."""

P_STABLE_THRESHOLD: Final = 0.5
"""Below this probability the structural ensemble holds a crystal to be unstable."""


class Doubt(StrEnum):
    """A reason not to believe that a crystal is stable; the value is what people read."""

    ELEMENTS_ONLY = "no known compound competes"
    FORMULA = "its formula is not expected to be stable"
    CHARGES = "charges do not balance"
    ENSEMBLE = "the ensemble does not expect it to be stable"


class FormulaJudge(Protocol):
    """Says of formulas alone how probably their best crystal is stable."""

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it knows."""
        ...

    def probabilities_stable(self, compositions: Sequence[Mapping[int, int]]) -> NDArray[np.float64]:
        """Probabilities (n,); NaN where it does not know."""
        ...


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is known of a candidate beside its energy.

    `n_competing`: compounds of its system and subsystems near the hull; `formula_check`: probability that its formula is stable, by a
    compositional ensemble; `p_stable`: that of the crystal, by the structural one; `charge_balanced` False where it was let through
    although its charges cannot cancel.
    """

    n_competing: int
    formula_check: float | None = None
    p_stable: float | None = None
    charge_balanced: bool = True

    @property
    def is_supported(self) -> bool:
        """Whether a verdict rests on more than the elements."""
        return self.n_competing > 0

    def doubts(self, formula_threshold: float = FORMULA_THRESHOLD) -> tuple[Doubt, ...]:
        """What speaks against it, in the order of their weight."""
        against = (
            (not self.is_supported, Doubt.ELEMENTS_ONLY),
            (self.formula_check is not None and self.formula_check < formula_threshold, Doubt.FORMULA),
            (not self.charge_balanced, Doubt.CHARGES),
            (self.p_stable is not None and self.p_stable < P_STABLE_THRESHOLD, Doubt.ENSEMBLE),
        )
        return tuple(doubt for holds, doubt in against if holds)


_Key = tuple[tuple[int, int], ...]


def _key(composition: Mapping[int, int]) -> _Key:
    divisor = int(np.gcd.reduce(list(composition.values())))
    return tuple(sorted((z, n // divisor) for z, n in composition.items()))


@dataclass(frozen=True)
class _Asked:
    """A judge that knows its answers already."""

    elements: frozenset[int]
    answers: Mapping[_Key, float]

    def probabilities_stable(self, compositions: Sequence[Mapping[int, int]]) -> NDArray[np.float64]:
        """Look the probabilities up."""
        return np.array([self.answers[_key(composition)] for composition in compositions])


def ask_at_once(judge: FormulaJudge, compositions: Sequence[Mapping[int, int]]) -> FormulaJudge:
    """Ask a judge for all compositions together, which is much faster than in small pieces; what is returned answers for these alone."""
    keys = [key for key in {_key(composition): None for composition in compositions} if {z for z, _ in key} <= judge.elements]
    probabilities = judge.probabilities_stable([dict(key) for key in keys]).tolist() if keys else []
    return _Asked(judge.elements, dict(zip(keys, probabilities, strict=True)))


def formula_checks(compositions: Sequence[Mapping[int, int]], judge: FormulaJudge | None) -> list[float | None]:
    """Probabilities that these formulas are stable, each asked once; None where nobody knows, and for elements."""
    found: list[float | None] = [None] * len(compositions)
    if judge is None:
        return found
    places: dict[_Key, list[int]] = {}
    for i, composition in enumerate(compositions):
        if set(composition) <= judge.elements and len(composition) > 1:
            places.setdefault(_key(composition), []).append(i)
    if places:
        probabilities = judge.probabilities_stable([dict(key) for key in places])
        for rows, probability in zip(places.values(), probabilities.tolist(), strict=True):
            for i in rows:
                found[i] = None if np.isnan(probability) else round(probability, 6)
    return found
