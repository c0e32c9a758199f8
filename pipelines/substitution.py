"""Which elements may replace which: data-mined ionic substitution probabilities with GNoME's changes.

Method: Hautier et al., Inorg. Chem. 50, 656 (2011), p(X, X') ~ exp(sum_i lambda_i f_i) / Z, with the weights that pymatgen carries
(`lambda.json`, 230 ions).  GNoME (Merchant et al., Nature 624, 80 (2023), Methods) changes three things, all of them here:

1. Only ions that change count.  An ion that stays contributes 1, so rare elements are not penalised for being there.
2. No weight is below 0: measured ones are floored and never-seen pairs have 0 (pymatgen: -5), before anything is normalised.
3. What passes a product of 1e-3 is proposed, found by branch and bound.

The probability is that of the child given the parent: p(child | parent) = exp(lambda) / sum over all ions of exp(lambda(parent, ion)).
It sums to 1 over what a parent's ion may become, so oxygen, which the data replaces by little else than fluorine and sulfur, gives no
oxygen-to-metal candidates although never-seen pairs have weight 0.  Normalising over the child instead (pymatgen's
`list_prediction(..., to_this_composition=False)`) would hand every rare ion 1/230 for replacing oxygen.  The weights are symmetric, so ours
is pymatgen's `to_this_composition=True` read backwards; the tests hold the two together.

Ions are an inner matter: a crystal has elements only.  A parent's element stands for the listed ion nearest to its guessed oxidation
state, and, where there is no guess or no listed ion of that sign, for all of its ions at once (the highest probability of any).  A child
element counts with the best of its ions; charge neutrality is not asked for, as GNoME dropped it.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pymatgen.analysis.structure_prediction.substitution_probability import SubstitutionProbability

from gnome.crystals.elements import MAX_ATOMIC_NUMBER, SYMBOLS

_ION = re.compile(r"([A-Z][a-z]?)(\d*)([+-])")
_ATOMIC_NUMBER = {symbol: z for z, symbol in enumerate(SYMBOLS) if z}
MAX_CHARGE_DIFFERENCE = 1.0
"""A guessed state further than this from every listed ion of its sign is as good as no guess."""


@dataclass(frozen=True, kw_only=True)
class SubstitutionSettings:
    """What counts as a likely substitution.

    `threshold` on the product of the probabilities of the ions that change; `max_replaced` ions change at once;
    `elements` are the atomic numbers that may be put in, all listed ones when None.
    """

    threshold: float = 1e-3
    max_replaced: int = 3
    elements: frozenset[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """A replacement of elements by others: `replaced` maps atomic numbers, `probability` is the product over them."""

    replaced: Mapping[int, int]
    probability: float


@dataclass(frozen=True, eq=False)
class SubstitutionTable:
    """Substitution probabilities between ions, and from ions to elements.

    `ions` are (atomic number, charge); `conditional` (ions, ions) is p(column | row).
    """

    ions: tuple[tuple[int, int], ...]
    conditional: NDArray[np.float64]

    def probability(self, parent: tuple[int, int], child: tuple[int, int]) -> float:
        """Probability that an ion (atomic number, charge) is replaced by another."""
        return float(self.conditional[self.ions.index(parent), self.ions.index(child)])

    def to_elements(self, z: int, state: float | None) -> NDArray[np.float64]:
        """Probabilities (104,) by atomic number that an element in an oxidation state becomes another element.

        An element the table does not list has never been seen replaced: weight 0 to every ion.
        """
        own = [(abs(charge - (state or 0.0)), i) for i, (number, charge) in enumerate(self.ions) if number == z]
        listed = [pair for pair in own if state and self.ions[pair[1]][1] * state > 0 and pair[0] <= MAX_CHARGE_DIFFERENCE]
        rows = [min(listed)[1]] if listed else [i for _, i in own]
        by_ion = self.conditional[rows].max(axis=0) if rows else np.full(len(self.ions), 1.0 / len(self.ions))
        by_element = np.zeros(MAX_ATOMIC_NUMBER + 1)
        np.maximum.at(by_element, [number for number, _ in self.ions], by_ion)
        by_element[z] = 0.0
        return by_element


@lru_cache(maxsize=4)
def load_table(*, unseen: float = 0.0, floor: float = 0.0) -> SubstitutionTable:
    """Read pymatgen's weights into a dense table; `unseen` is Hautier's alpha and `floor` the smallest weight."""
    path = Path(str(sys.modules[SubstitutionProbability.__module__].__file__)).parent / "data" / "lambda.json"
    rows = [row for row in json.loads(path.read_bytes()) if "D1+" not in row]
    ions = sorted({_parse_ion(name) for row in rows for name in row[:2]})
    position = {ion: i for i, ion in enumerate(ions)}
    weights = np.full((len(ions), len(ions)), unseen)
    for first, second, weight in rows:
        i, j = position[_parse_ion(first)], position[_parse_ion(second)]
        weights[i, j] = weights[j, i] = float(weight)
    likelihood = np.exp(np.maximum(weights, floor))
    conditional = likelihood / likelihood.sum(axis=1, keepdims=True)
    conditional.setflags(write=False)
    return SubstitutionTable(tuple(ions), conditional)


def _parse_ion(name: str) -> tuple[int, int]:
    match = _ION.fullmatch(name)
    if match is None:
        raise ValueError(f"substitution table: {name!r} is no ion")
    symbol, charge, sign = match.groups()
    return _ATOMIC_NUMBER[symbol], int(charge or 1) * (1 if sign == "+" else -1)


def likely_substitutions(
    composition: Mapping[int, int], states: Mapping[int, float], table: SubstitutionTable, settings: SubstitutionSettings
) -> list[Substitution]:
    """List every replacement of one to `max_replaced` elements whose probability exceeds the threshold.

    `states` are guessed oxidation states, possibly of none of the elements.  No two elements become the same one, nor one that stays.
    Branch and bound over the elements: unchanged ones contribute 1, so a partial product bounds all its completions.
    Sorted by falling probability, then by atomic numbers.
    """
    allowed = np.ones(MAX_ATOMIC_NUMBER + 1, dtype=bool)
    if settings.elements is not None:
        allowed[:] = False
        allowed[sorted(settings.elements)] = True
    options: dict[int, list[tuple[float, int]]] = {}
    for z in sorted(composition):
        row = np.where(allowed, table.to_elements(z, states.get(z)), 0.0)
        options[z] = sorted(((float(row[child]), int(child)) for child in np.flatnonzero(row > settings.threshold)), reverse=True)
    found: list[Substitution] = []
    _branch(sorted(composition), options, settings, {}, 1.0, found)
    return sorted(found, key=lambda s: (-s.probability, sorted(s.replaced.items())))


def _branch(
    remaining: list[int],
    options: Mapping[int, list[tuple[float, int]]],
    settings: SubstitutionSettings,
    replaced: dict[int, int],
    probability: float,
    found: list[Substitution],
) -> None:
    if not remaining:
        staying = options.keys() - replaced.keys()
        if replaced and not staying & set(replaced.values()):
            found.append(Substitution(replaced=dict(replaced), probability=probability))
        return
    z, rest = remaining[0], remaining[1:]
    _branch(rest, options, settings, replaced, probability, found)
    if len(replaced) == settings.max_replaced:
        return
    for p, child in options[z]:
        if probability * p <= settings.threshold:
            break  # options fall in probability: no later one passes either
        if child not in replaced.values():
            _branch(rest, options, settings, {**replaced, z: child}, probability * p, found)
