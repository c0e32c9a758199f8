"""Which compounds a system is expected to hold that the database lacks, by their formulas alone."""

from collections.abc import Iterable
from typing import Final

import numpy as np

from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formula import reduced_formula
from gnome.models.formula_ensemble import CompositionalEnsemble
from gnome.quantities import PLAUSIBLE_E_FORM, STABLE_TOLERANCE
from gnome.stability.hull import ConvexHull, HullEntry
from pipelines.compositions import FormulaSettings, enumerate_formulas

MOST_ELEMENTS: Final = 6
"""Systems of more elements are not looked at: they hold too many formulas."""

_FORMULAS: Final = FormulaSettings(n_elements=(2, 3, 4), max_coefficient=7, max_atoms=14, attempts=12_000, max_between=0)
_ASKED, _MEMBERS, _EXPECTED = 1500, 3, 0.5


def expected_compounds(
    symbols: Iterable[str], known_formulas: frozenset[str], judge: CompositionalEnsemble
) -> list[tuple[str, float]]:
    """Return charge-balanced formulas of these elements that are not known, and how probably each is stable, the likeliest first.

    Those above one half that lie on the hull of all that were asked, by the first members of the ensemble: a hint at what to import, no
    more.
    """
    elements = {SYMBOLS.index(symbol) for symbol in symbols} & judge.elements
    if not 2 <= len(elements) <= MOST_ELEMENTS:
        return []
    asked = list(enumerate_formulas(elements, limit=_ASKED, seed=0, known_formulas=known_formulas, settings=_FORMULAS))
    if not asked:
        return []
    some = CompositionalEnsemble(judge.members[:_MEMBERS], judge.card)
    answers = some.answers(asked)
    low, high = PLAUSIBLE_E_FORM
    e_forms = np.clip(np.nan_to_num(answers.e_form_per_atom), low, high)
    hull = ConvexHull(answers.method)
    hull.add(
        HullEntry(id=str(i), composition=composition, e_form_per_atom=float(e_form))
        for i, (composition, e_form) in enumerate(zip(asked, e_forms, strict=True))
    )
    on_hull = hull.e_above_hulls(asked, e_forms) <= STABLE_TOLERANCE
    likely = [
        (reduced_formula(asked[i]), round(float(answers.p_stable[i]), 3))
        for i in np.flatnonzero(on_hull & (answers.p_stable > _EXPECTED))
    ]
    return sorted(likely, key=lambda pair: (-pair[1], pair[0]))
