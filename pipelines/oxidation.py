"""Oxidation states of compositions: crystals carry none, and the substitution table speaks of ions.

States are those that pymatgen lists as found in the ICSD, all known ones where it lists none.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import comb, gcd, prod
from typing import Final

from pymatgen.core import Composition, Element

from gnome.crystals.elements import SYMBOLS

MAX_COMBINATIONS = 20_000
"""Assignments of states to atoms beyond which a composition is not guessed at: LaFe4P12 alone takes over a second."""

SALT_FORMERS: Final = frozenset({8, 9, 17, 35, 53})
"""O, F, Cl, Br and I: what they bind is an ion."""

OXYGEN_BOND: Final = 1.9
"""angstrom: oxygen atoms nearer than this are a pair (1.2 in O2, 1.3 in superoxides, 1.5 in peroxides; 2.2 and more between O2-)."""

_OXYGEN: Final = 8
_BONDED_OXYGEN: Final = (-2, -1, 0)


def guess_oxidation_states(composition: Mapping[int, int]) -> dict[int, float]:
    """Guess the mean oxidation state of every element, or answer with nothing.

    The likeliest charge-neutral assignment of pymatgen's `oxi_state_guesses` on the reduced formula.  Empty for what has none
    (most intermetallics) and for compositions with more than `MAX_COMBINATIONS` assignments.
    """
    factor = gcd(*composition.values())
    return dict(_guess(tuple((z, composition[z] // factor) for z in sorted(composition))))


def is_salt(composition: Mapping[int, int]) -> bool:
    """Say whether a compound's oxygen or halogen makes it a salt, in which charges have to cancel."""
    return len(composition) > 1 and not SALT_FORMERS.isdisjoint(composition)


def can_be_neutral(composition: Mapping[int, int], *, oxygen_pairs: bool = False) -> bool:
    """Say whether charges cancel in some assignment of known states to the atoms; those of one element may differ, as in Fe3O4.

    `oxygen_pairs`: the crystal holds O-O bonds, so that oxygen may be that of peroxides, superoxides and ozonides.
    """
    factor = gcd(*composition.values())
    return _is_neutral(tuple((z, composition[z] // factor) for z in sorted(composition)), oxygen_pairs)


@lru_cache(maxsize=65536)
def _is_neutral(amounts: tuple[tuple[int, int], ...], oxygen_pairs: bool) -> bool:
    """Walk through the sums of charges that can be reached, as bits of a number: bit i stands for the sum i - offset."""
    states = {z: _BONDED_OXYGEN if z == _OXYGEN and oxygen_pairs else _known_states(z) for z, _ in amounts}
    offset = sum(n * max(map(abs, states[z]), default=0) for z, n in amounts)
    reached = 1 << offset
    for z, n in amounts:
        for _ in range(n):
            shifted = 0
            for state in states[z]:
                shifted |= reached << state if state >= 0 else reached >> -state
            reached = shifted
    return bool(reached >> offset & 1)


@lru_cache(maxsize=256)
def _known_states(z: int) -> tuple[int, ...]:
    """States found in the ICSD and those that textbooks call common: the ICSD's list of chlorine has no chlorates."""
    return tuple(sorted({*_states(z), *map(int, Element.from_Z(z).common_oxidation_states)}))


@lru_cache(maxsize=256)
def _states(z: int) -> tuple[int, ...]:
    element = Element.from_Z(z)
    states = element.icsd_oxidation_states or element.oxidation_states or element.common_oxidation_states  # the last for Kr, Xe
    return tuple(int(state) for state in states)


@lru_cache(maxsize=65536)
def _guess(amounts: tuple[tuple[int, int], ...]) -> tuple[tuple[int, float], ...]:
    if prod(comb(n + max(len(_states(z)), 1) - 1, max(len(_states(z)), 1) - 1) for z, n in amounts) > MAX_COMBINATIONS:
        return ()
    guesses = Composition({SYMBOLS[z]: n for z, n in amounts}).oxi_state_guesses(max_sites=-1)
    if not guesses:
        return ()
    return tuple((Element(symbol).Z, float(state)) for symbol, state in guesses[0].items())
