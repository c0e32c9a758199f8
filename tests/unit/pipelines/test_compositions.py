from itertools import product

import numpy as np
import pytest

from gnome.crystals.formula import parse_formula, reduced_formula
from pipelines.compositions import FormulaSettings, common_states, enumerate_formulas, is_balanced

OXYGEN, SODIUM, CHLORINE, HELIUM = 8, 11, 17, 2


@pytest.mark.parametrize(
    ("formula", "strict", "relaxed"),
    [
        ("NaCl", True, True),
        ("MgAl2O4", True, True),
        ("NaNO3", True, True),
        ("Li15Si4", True, True),  # silicon at -3.75; strictly balanced too, as an alloy with everything at 0
        ("Fe3O4", False, True),  # iron at 8/3
        ("LaFe4P12", False, True),
        ("Rb6O", False, True),  # rubidium between 0 and 1: a metal
        ("NaO7", False, False),  # oxygen has one state
        ("O3F", False, False),
        ("NaHe", False, False),  # helium has none
    ],
)
def test_known_formulas(formula, strict, relaxed):
    composition = parse_formula(formula)
    assert is_balanced(composition, max_between=0) == strict
    assert is_balanced(composition) == relaxed


def test_between_states_is_needed_where_zero_does_not_help():
    """Li15Si4's case with phosphorus, which has no 0: -2.75 lies between two of its states, -3.75 below the lowest."""
    caesium, phosphorus, fluorine = 55, 15, 9
    assert not is_balanced({caesium: 11, phosphorus: 4}, max_between=0)
    assert is_balanced({caesium: 11, phosphorus: 4}, max_between=1)
    assert not is_balanced({20: 15, phosphorus: 4, fluorine: 19}, max_between=0)
    assert not is_balanced({caesium: 4, fluorine: 11}, max_between=2)  # fluorine has one state and caesium ends at 1


def test_balance_agrees_with_a_search_over_average_states():
    """Average states of up to two elements on a fine grid, all others in a listed one."""
    rng = np.random.default_rng(0)
    states = common_states()
    usable = [z for z in range(1, 95) if states[z]]
    verdicts = []
    for _ in range(60):
        elements = rng.choice(usable, 3, replace=False).tolist()
        composition = dict(zip(elements, rng.integers(1, 5, 3).tolist(), strict=True))
        grids = [np.arange(states[z][0] * 60, states[z][-1] * 60 + 1) * composition[z] for z in elements]
        listed = [[state * 60 * composition[z] for state in states[z]] for z in elements]
        expected = any(
            np.isin(-fixed - grids[i], grids[j]).any() for i, j, k in [(0, 1, 2), (0, 2, 1), (1, 2, 0)] for fixed in listed[k]
        )
        verdicts.append(expected)
        assert is_balanced(composition) == expected, composition
    assert {True, False} == set(verdicts)


def test_small_space_is_listed_completely():
    settings = FormulaSettings(n_elements=(2,), max_coefficient=4, max_atoms=6, max_between=0)
    found = list(enumerate_formulas([SODIUM, OXYGEN, CHLORINE, HELIUM], limit=1000, seed=0, settings=settings))
    expected = set()
    for a, b in [(SODIUM, OXYGEN), (SODIUM, CHLORINE), (OXYGEN, CHLORINE)]:
        for i, j in product(range(1, 5), repeat=2):
            if i + j <= 6 and np.gcd(i, j) == 1 and is_balanced({a: i, b: j}, max_between=0):
                expected.add(reduced_formula({a: i, b: j}))
    assert {reduced_formula(composition) for composition in found} == expected
    assert len(found) == len(expected)
    assert {"Na2O2", "NaCl"} & expected == {"NaCl"}
    assert "Na2O" in expected


def test_seeded_bounded_and_without_repeats():
    elements = list(range(1, 84))
    first = list(enumerate_formulas(elements, limit=300, seed=7))
    assert first == list(enumerate_formulas(reversed(elements), limit=300, seed=7))
    assert first[:50] == list(enumerate_formulas(elements, limit=50, seed=7))
    assert first != list(enumerate_formulas(elements, limit=300, seed=8))
    formulas = [reduced_formula(composition) for composition in first]
    assert len(first) == len(set(formulas)) == 300
    settings = FormulaSettings()
    for composition in first:
        assert list(composition) == sorted(composition)
        assert np.gcd.reduce(list(composition.values())) == 1
        assert sum(composition.values()) <= settings.max_atoms
        assert max(composition.values()) <= settings.max_coefficient
        assert is_balanced(composition)
    sizes = [len(composition) for composition in first]
    assert sizes[:6] == [2, 3, 2, 3, 2, 3]


def test_attempts_bound_the_work():
    few = list(enumerate_formulas(range(1, 84), limit=10**6, seed=0, settings=FormulaSettings(attempts=40)))
    assert 0 < len(few) <= 40


def test_known_formulas_are_skipped_and_edges_hold():
    settings = FormulaSettings(n_elements=(2,))
    every = [reduced_formula(c) for c in enumerate_formulas([SODIUM, CHLORINE], limit=100, seed=0, settings=settings)]
    left = enumerate_formulas([SODIUM, CHLORINE], limit=100, seed=0, known_formulas=frozenset({"NaCl"}), settings=settings)
    assert {reduced_formula(c) for c in left} == set(every) - {"NaCl"}
    assert "NaCl" in every
    assert list(enumerate_formulas([], limit=5, seed=0)) == []
    assert list(enumerate_formulas([HELIUM], limit=5, seed=0)) == []
    assert list(enumerate_formulas([SODIUM, CHLORINE], limit=0, seed=0)) == []
