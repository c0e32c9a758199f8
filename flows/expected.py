"""Which compounds a system is expected to hold that the database lacks, by their formulas alone."""

from collections.abc import Iterable
from typing import Final

from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formula import reduced_formula
from gnome.models.formula_ensemble import CompositionalEnsemble
from pipelines.compositions import FormulaSettings, enumerate_formulas

MOST_ELEMENTS: Final = 6
"""Systems of more elements are not looked at: they hold too many formulas."""

_FORMULAS: Final = FormulaSettings(n_elements=(2, 3, 4), max_coefficient=7, max_atoms=14, attempts=12_000, max_between=0)
_ASKED, _MEMBERS, _EXPECTED = 1500, 3, 0.5


def expected_compounds(
    symbols: Iterable[str], known_formulas: frozenset[str], judge: CompositionalEnsemble
) -> list[tuple[str, float]]:
    """Return charge-balanced formulas of these elements that are not known, and how probably each is stable, the likeliest first.

    Those above one half, by the first members of the ensemble: a hint at what to import, no more.
    """
    elements = {SYMBOLS.index(symbol) for symbol in symbols} & judge.elements
    if not 2 <= len(elements) <= MOST_ELEMENTS:
        return []
    asked = list(enumerate_formulas(elements, limit=_ASKED, seed=0, known_formulas=known_formulas, settings=_FORMULAS))
    if not asked:
        return []
    some = CompositionalEnsemble(judge.members[:_MEMBERS], judge.card)
    found = zip(asked, some.probabilities_stable(asked).tolist(), strict=True)
    likely = [(reduced_formula(composition), round(p, 3)) for composition, p in found if p > _EXPECTED]
    return sorted(likely, key=lambda pair: (-pair[1], pair[0]))
