import numpy as np
import pytest
from pymatgen.analysis.structure_prediction.substitution_probability import SubstitutionPredictor, SubstitutionProbability

from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formula import parse_formula
from pipelines.oxidation import guess_oxidation_states
from pipelines.substitution import SubstitutionSettings, likely_substitutions, load_table

FORMULAS = ["NaCl", "SrTiO3", "MgAl2O4", "Fe3O4", "NiAl", "ZnTe", "K2NaAlF6", "Fe"]


@pytest.fixture(scope="module")
def pymatgen():
    return SubstitutionProbability()


def as_symbols(substitution):
    return {SYMBOLS[old]: SYMBOLS[new] for old, new in substitution.replaced.items()}


def propose(formula, table=None, **settings):
    composition = parse_formula(formula)
    states = guess_oxidation_states(composition)
    return likely_substitutions(composition, states, table or load_table(), SubstitutionSettings(**settings))


@pytest.mark.parametrize(("parent", "child"), [((11, 1), (19, 1)), ((8, -2), (16, -2)), ((26, 3), (13, 3)), ((38, 2), (9, -1))])
def test_unchanged_hautier_model_is_pymatgens(parent, child, pymatgen):
    names = [f"{SYMBOLS[z]}{abs(charge)}{'+' if charge > 0 else '-'}" for z, charge in (parent, child)]
    ours = load_table(unseen=-5.0, floor=-np.inf).probability(parent, child)
    assert ours == pytest.approx(pymatgen.cond_prob(names[1], names[0]), rel=1e-9)


def test_pairs_of_ions_agree_with_pymatgens_predictor():
    """pymatgen counts unchanged ions at their own probability, so the two must agree where every ion changes."""
    threshold = 1e-3
    predicted = SubstitutionPredictor(threshold=threshold).list_prediction(["Na+", "Cl-"], to_this_composition=True)
    expected: dict[tuple[str, str], float] = {}
    for row in predicted:
        became = {parent.rstrip("+-"): str(child.element) for child, parent in row["substitutions"].items()}
        key = (became["Na"], became["Cl"])
        if key[0] != "Na" and key[1] != "Cl" and key[0] != key[1]:
            expected[key] = max(expected.get(key, 0.0), row["probability"])
    table = load_table(unseen=-5.0, floor=-np.inf)
    ours = {
        (as_symbols(s)["Na"], as_symbols(s)["Cl"]): s.probability
        for s in propose("NaCl", table, threshold=threshold)
        if len(s.replaced) == 2
    }
    assert len(expected) > 50
    assert ours == pytest.approx(expected, rel=1e-9)


def test_probabilities_of_an_ion_sum_to_one_and_no_unseen_pair_is_impossible():
    conditional = load_table().conditional
    np.testing.assert_allclose(conditional.sum(axis=1), 1.0)
    assert conditional.min() > 0
    assert len(load_table().ions) == 230


@pytest.mark.parametrize("formula", FORMULAS)
def test_branch_and_bound_finds_what_brute_force_finds(formula):
    """All replacements of up to two elements, by plain loops."""
    composition, threshold, table = parse_formula(formula), 2e-3, load_table()
    states = guess_oxidation_states(composition)
    rows = {z: table.to_elements(z, states.get(z)) for z in composition}
    expected = set()
    for z in composition:
        for x in np.flatnonzero(rows[z] > threshold):
            if x not in composition:
                expected.add(((z, int(x)),))
            for y in composition:
                if y <= z:
                    continue
                for w in np.flatnonzero(rows[y] * rows[z][x] > threshold):
                    staying = set(composition) - {z, y}
                    if w != x and not {int(w), int(x)} & staying:
                        expected.add(((z, int(x)), (y, int(w))))
    found = propose(formula, threshold=threshold, max_replaced=2)
    assert {tuple(sorted(s.replaced.items())) for s in found} == expected
    assert len(found) == len(expected) > 0
    for s in found:
        assert s.probability == pytest.approx(np.prod([rows[z][x] for z, x in s.replaced.items()]))


@pytest.mark.parametrize("formula", FORMULAS)
def test_no_two_elements_merge_and_the_order_is_by_probability(formula):
    composition = parse_formula(formula)
    found = propose(formula)
    assert found, "every composition can be substituted, with or without oxidation states"
    for s in found:
        after = [s.replaced.get(z, z) for z in composition]
        assert len(set(after)) == len(composition)
        assert after != list(composition)
    probabilities = [s.probability for s in found]
    assert probabilities == sorted(probabilities, reverse=True)
    assert min(probabilities) > 1e-3


def test_chemistry_is_in_the_right_order():
    first = [as_symbols(s) for s in propose("SrTiO3")[:12]]
    assert {"Sr": "Ba"} in first
    assert {"Sr": "Ca"} in first
    oxygen = {s.replaced[8] for s in propose("SrTiO3") if set(s.replaced) == {8}}
    assert {9, 16} <= oxygen  # fluorine and sulfur
    assert 26 not in oxygen  # no oxide becomes an iron compound by losing its oxygen


def test_only_wanted_elements_are_put_in():
    wanted = frozenset(parse_formula("KRbBrI"))
    found = propose("NaCl", elements=wanted)
    assert found
    assert {new for s in found for new in s.replaced.values()} <= wanted


def test_an_element_the_table_does_not_list_is_replaced_too():
    assert propose("PmCl3")


def test_oxidation_states_are_guessed_and_hard_compositions_passed_over():
    assert guess_oxidation_states(parse_formula("Fe3O4"))[26] == pytest.approx(8 / 3)
    assert guess_oxidation_states({12: 4, 8: 4}) == guess_oxidation_states({12: 1, 8: 1}) == {12: 2.0, 8: -2.0}
    assert guess_oxidation_states(parse_formula("NiAl")) == {}
    assert guess_oxidation_states(parse_formula("LaFe4P12")) == {}
