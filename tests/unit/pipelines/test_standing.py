import numpy as np
import pytest

from gnome.crystals.formula import parse_formula
from pipelines.standing import FORMULA_THRESHOLD, Doubt, Standing, ask_at_once, formula_checks


class Judge:
    """Knows eight elements; a probability that depends on the reduced formula alone, unknown where there is chlorine."""

    elements = frozenset(parse_formula("LiNaMgFeOSClF"))

    def __init__(self) -> None:
        self.asked: list[dict[int, int]] = []

    def probabilities_stable(self, compositions):
        self.asked += [dict(composition) for composition in compositions]
        return np.array([np.nan if 17 in c else sum(z * n for z, n in c.items()) % 97 / 97 for c in compositions])


FORMULAS = ["LiFeO2", "Na2O", "NaCl", "Fe", "O2", "NaK", "MgO", "LiF"]


def compositions(*formulas: str) -> list[dict[int, int]]:
    return [dict(parse_formula(formula)) for formula in formulas]


@pytest.mark.parametrize(
    ("standing", "doubts"),
    [
        (Standing(n_competing=1), ()),
        (Standing(n_competing=0), (Doubt.ELEMENTS_ONLY,)),
        (Standing(n_competing=3, formula_check=FORMULA_THRESHOLD), ()),
        (Standing(n_competing=3, formula_check=FORMULA_THRESHOLD - 1e-6), (Doubt.FORMULA,)),
        (Standing(n_competing=3, formula_check=0.0), (Doubt.FORMULA,)),
        (Standing(n_competing=3, formula_check=0.9, charge_balanced=False), (Doubt.CHARGES,)),
        (
            Standing(n_competing=0, formula_check=0.1, charge_balanced=False),
            (Doubt.ELEMENTS_ONLY, Doubt.FORMULA, Doubt.CHARGES),
        ),
    ],
)
def test_doubts_are_what_is_known_to_speak_against_it(standing, doubts):
    assert standing.doubts() == doubts
    assert standing.is_supported == (Doubt.ELEMENTS_ONLY not in doubts)


def test_a_look_by_fewer_networks_doubts_less():
    standing = Standing(n_competing=1, formula_check=0.2)
    assert standing.doubts() == (Doubt.FORMULA,)
    assert standing.doubts(0.15) == ()


def test_doubts_are_words():
    assert [str(doubt) for doubt in Doubt] == [
        "no known compound competes",
        "its formula is not expected to be stable",
        "charges do not balance",
        "the ensemble does not expect it to be stable",
    ]


def test_every_formula_is_asked_once_and_elements_and_strangers_never():
    judge = Judge()
    asked = compositions(*FORMULAS)
    twice = [{z: 2 * n for z, n in composition.items()} for composition in asked]
    found = formula_checks([*asked, *twice], judge)
    assert judge.asked == [dict(sorted(c.items())) for c in compositions("LiFeO2", "Na2O", "NaCl", "MgO", "LiF")]
    assert found[: len(asked)] == found[len(asked) :], "twice the formula is the same formula"
    known = dict(zip(FORMULAS, found, strict=False))
    assert known["Fe"] is known["O2"] is None, "elements"
    assert known["NaK"] is None, "an element that the judge does not know"
    assert known["NaCl"] is None, "not a number"
    assert known["MgO"] == pytest.approx((12 + 8) / 97, abs=1e-6)
    assert known["LiFeO2"] == pytest.approx((3 + 26 + 16) / 97, abs=1e-6)


def test_nobody_knows_without_a_judge_or_a_formula():
    assert formula_checks(compositions("NaCl", "MgO"), None) == [None, None]
    judge = Judge()
    assert formula_checks([], judge) == []
    assert formula_checks(compositions("Fe", "NaK"), judge) == [None, None]
    assert judge.asked == []


def test_asking_at_once_is_asking_one_by_one():
    alone, together = Judge(), Judge()
    wanted = compositions(*FORMULAS, "Mg2O2", "NaLiO")
    one_by_one = [formula_checks([composition], alone)[0] for composition in wanted]
    at_once = ask_at_once(together, wanted)
    n_asked = len(together.asked)
    assert n_asked == len({tuple(c.items()) for c in together.asked}), "each once"
    assert at_once.elements == together.elements
    for size in (1, 3, len(wanted)):
        pieces = [formula_checks(wanted[i : i + size], at_once) for i in range(0, len(wanted), size)]
        assert [found for piece in pieces for found in piece] == one_by_one
    assert len(together.asked) == n_asked, "and not again"
    assert sum(found is not None for found in one_by_one) == 6


def test_nothing_is_asked_where_there_is_nothing_to_ask():
    judge = Judge()
    assert formula_checks(compositions("NaK"), ask_at_once(judge, compositions("NaK"))) == [None]
    assert judge.asked == []
