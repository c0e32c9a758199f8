"""What the shipped compositional ensemble expects of systems that a database does not cover."""

from flows.expected import expected_compounds
from gnome.models.formula_ensemble import CompositionalEnsemble
from gnome.shipped import shipped_data


def test_known_compounds_that_a_database_lacks_are_expected() -> None:
    judge = CompositionalEnsemble.load(shipped_data() / "ensembles" / "compositional.safetensors")
    found = dict(expected_compounds(("Li", "P", "O"), frozenset({"Li2O"}), judge))
    assert found["Li3PO4"] > 0.7
    assert "Li2O" not in found, "it is known"
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert all(0.5 < p <= 1 for p in found.values())
    assert expected_compounds(("Li",), frozenset(), judge) == [], "an element has no compounds"
    assert expected_compounds(("Li", "Na", "K", "Rb", "Cs", "O", "S"), frozenset(), judge) == [], "too many formulas"
