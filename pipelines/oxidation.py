"""Oxidation states of compositions: crystals carry none, and the substitution table speaks of ions."""

from collections.abc import Mapping
from functools import lru_cache
from math import comb, gcd, prod

from pymatgen.core import Composition, Element

from gnome.crystals.elements import SYMBOLS

MAX_COMBINATIONS = 20_000
"""Assignments of states to atoms beyond which a composition is not guessed at: LaFe4P12 alone takes over a second."""


def guess_oxidation_states(composition: Mapping[int, int]) -> dict[int, float]:
    """Guess the mean oxidation state of every element, or answer with nothing.

    The likeliest charge-neutral assignment of pymatgen's `oxi_state_guesses` on the reduced formula.  Empty for what has none
    (most intermetallics) and for compositions with more than `MAX_COMBINATIONS` assignments.
    """
    factor = gcd(*composition.values())
    return dict(_guess(tuple((z, composition[z] // factor) for z in sorted(composition))))


@lru_cache(maxsize=65536)
def _guess(amounts: tuple[tuple[int, int], ...]) -> tuple[tuple[int, float], ...]:
    elements = [(Element.from_Z(z), n) for z, n in amounts]
    states = [len(element.icsd_oxidation_states or element.oxidation_states) for element, _ in elements]
    if prod(comb(n + max(k, 1) - 1, max(k, 1) - 1) for (_, n), k in zip(elements, states, strict=True)) > MAX_COMBINATIONS:
        return ()
    guesses = Composition({SYMBOLS[z]: n for z, n in amounts}).oxi_state_guesses(max_sites=-1)
    if not guesses:
        return ()
    return tuple((Element(symbol).Z, float(state)) for symbol, state in guesses[0].items())
