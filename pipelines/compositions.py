"""Formulas nobody has listed: enumeration under a relaxed balance of oxidation states.

Source: Merchant et al., Nature 624, 80 (2023), Methods, "Compositional models".  Common oxidation states, with 0 added for metals, and
up to two elements in any average state between two adjacent ones of theirs: Li15Si4 passes with silicon at -3.75.  The states are those
pymatgen calls common.  Zero is added to metals and metalloids only: were it everybody's, all formulas would balance with everything at
or near 0, and the rule would say nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import comb, gcd

import numpy as np
from pymatgen.core import Element

from gnome.crystals.elements import MAX_ATOMIC_NUMBER
from gnome.crystals.formula import reduced_formula

Composition = dict[int, int]
"""Amounts by atomic number, ascending, without a common divisor."""


@lru_cache(maxsize=1)
def common_states() -> tuple[tuple[int, ...], ...]:
    """Oxidation states by atomic number, ascending; empty for elements that bind to nothing."""
    states: list[tuple[int, ...]] = [()]
    for z in range(1, MAX_ATOMIC_NUMBER + 1):
        element = Element.from_Z(z)
        own = set(element.common_oxidation_states)
        if own and (element.is_metal or element.is_metalloid):
            own.add(0)
        states.append(tuple(sorted(own)))
    return tuple(states)


def is_balanced(composition: Mapping[int, int], *, max_between: int = 2) -> bool:
    """Say whether charges can balance: every element in a common state, but up to `max_between` of them between two adjacent ones.

    `max_between=0` is strict balance.  False when an element has no state at all.
    """
    states = common_states()
    elements = sorted(composition)
    if not all(states[z] for z in elements):
        return False
    reachable = {z: [composition[z] * state for state in states[z]] for z in elements}
    for n_between in range(min(max_between, len(elements)) + 1):
        for between in combinations(elements, n_between):
            # Adjacent intervals tile the range from the lowest to the highest state, so the range is all that matters.
            low = sum(reachable[z][0] for z in between)
            high = sum(reachable[z][-1] for z in between)
            exact = (reachable[z] for z in elements if z not in between)
            if any(low <= -sum(charges) <= high for charges in product(*exact)):
                return True
    return False


@dataclass(frozen=True, kw_only=True)
class FormulaSettings:
    """Bounds of the enumeration.

    `n_elements` are the numbers of elements tried, in turn; coefficients go to `max_coefficient`, atoms of a reduced formula to
    `max_atoms`; at most `attempts` formulas are drawn; `max_between` elements may lie between two of their states.
    """

    n_elements: tuple[int, ...] = (2, 3)
    max_coefficient: int = 8
    max_atoms: int = 14
    attempts: int = 20_000
    max_between: int = 2


DEFAULT_FORMULAS = FormulaSettings()


def enumerate_formulas(
    elements: Iterable[int],
    *,
    limit: int,
    seed: int,
    known_formulas: frozenset[str] = frozenset(),
    settings: FormulaSettings = DEFAULT_FORMULAS,
) -> Iterator[Composition]:
    """Yield at most `limit` balanced reduced compositions of the given elements, in a seeded random order without repeats.

    Formulas in `known_formulas` are skipped.  The numbers of elements take turns, so that the many ternaries leave room for
    binaries. A space with fewer formulas than there are attempts is listed completely.
    """
    usable = sorted({z for z in elements if common_states()[z]})
    rng = np.random.default_rng(seed)
    sizes = [n for n in settings.n_elements if 1 <= n <= len(usable)]
    draws = [_draw_formulas(usable, n, settings, settings.attempts // len(sizes), rng) for n in sizes]
    while draws and limit > 0:
        turn = draws.pop(0)
        for composition in turn:
            if is_balanced(composition, max_between=settings.max_between) and reduced_formula(composition) not in known_formulas:
                yield composition
                limit -= 1
                draws.append(turn)
                break


def _draw_formulas(
    usable: Sequence[int], n: int, settings: FormulaSettings, attempts: int, rng: np.random.Generator
) -> Iterator[Composition]:
    """Draw compositions of n elements without replacement."""
    ratios = _ratios(n, settings.max_coefficient, settings.max_atoms)
    total = comb(len(usable), n) * len(ratios)
    for index in rng.choice(total, size=min(attempts, total), replace=False):
        which, ratio = divmod(int(index), len(ratios))
        chosen = _combination(usable, n, which)
        yield dict(zip(chosen, ratios[ratio], strict=True))


@lru_cache(maxsize=64)
def _ratios(n: int, max_coefficient: int, max_atoms: int) -> tuple[tuple[int, ...], ...]:
    """All n-tuples of coefficients without a common divisor."""
    coefficients = product(range(1, max_coefficient + 1), repeat=n)
    return tuple(ratio for ratio in coefficients if sum(ratio) <= max_atoms and gcd(*ratio) == 1)


def _combination(items: Sequence[int], n: int, index: int) -> list[int]:
    """Give the combination of n items that stands at `index` in lexicographic order."""
    chosen, start = [], 0
    for left in range(n, 0, -1):
        while index >= (skipped := comb(len(items) - start - 1, left - 1)):
            index -= skipped
            start += 1
        chosen.append(items[start])
        start += 1
    return chosen
