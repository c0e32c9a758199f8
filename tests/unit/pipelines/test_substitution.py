import numpy as np
import pytest
from pymatgen.analysis.structure_prediction.substitution_probability import SubstitutionPredictor, SubstitutionProbability
from pymatgen.core import Composition, Element

from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formula import parse_formula
from pipelines.oxidation import can_be_neutral, guess_oxidation_states
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


BALANCED = (
    "NaCl MgO Fe3O4 SrTiO3 TiO2 Ti4O7 CaF2 LiFePO4 LiFeO2 FePO4 CO2 H2O BaTiO3 Al2O3 ZrF4 GaAs K2NaAlF6 CsPbBr3 Pb3O4 N2O5 NH4Cl "
    "SiC PmCl3 U3O8 Mg3N2 SF6 XeF2 AuCl3 AuCl PtO2"
)
UNBALANCED = "MgCl NiAl CaF NaFeO3 AlO Al2O LaNi5 MnO4 TaF2 BO HeO Cu3Au S2O7 Na2O2 KO2 MgF3 XeF3"


@pytest.mark.filterwarnings("ignore:No Pauling electronegativity:UserWarning")  # pymatgen, on noble gases
@pytest.mark.parametrize("formula", [*BALANCED.split(), *UNBALANCED.split()])
def test_charges_cancel_where_pymatgen_finds_states_for_it(formula):
    composition = parse_formula(formula)
    others = {
        SYMBOLS[z]: list(Element.from_Z(z).oxidation_states or Element.from_Z(z).common_oxidation_states)
        for z in composition
        if not Element.from_Z(z).icsd_oxidation_states  # of which pymatgen takes the common states alone
    }
    found = Composition(formula).oxi_state_guesses(max_sites=-1, oxi_states_override=others)
    assert can_be_neutral(composition) == bool(found) == (formula in BALANCED.split())
    assert can_be_neutral({z: 3 * n for z, n in composition.items()}) == bool(found)


def test_charges_of_large_formulas_are_added_up_in_no_time():
    """Which pymatgen takes minutes or a second for: ways to share states out are far too many."""
    assert can_be_neutral(parse_formula("LaFe4P12"))
    assert can_be_neutral({25: 20, 26: 21, 27: 22, 8: 84})
    assert not can_be_neutral({11: 40, 9: 41})
