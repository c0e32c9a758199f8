from dataclasses import dataclass

import numpy as np
import pytest

from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import parse_formula, reduced_formula
from gnome.errors import InvalidInput
from gnome.stability.hull import ConvexHull, HullEntry
from pipelines.candidate import Candidate
from pipelines.compositional import CompositionalPipeline, CompositionalSettings
from pipelines.compositions import FormulaSettings
from pipelines.formula_screening import fit_formula_offset, screen_formulas, select_formulas
from pipelines.random_structures import RandomSearch, RandomStructure

ELEMENTS = frozenset(parse_formula("LiNaKClBrO"))


@dataclass
class ToyFormulas:
    """Three members around minus the atomic fraction of oxygen."""

    elements: frozenset[int] = ELEMENTS
    method: str = "pbe"
    model_id: str = "toy"

    def member_energies(self, compositions):
        fractions = np.array([c.get(8, 0) / sum(c.values()) for c in compositions])
        return np.stack([-fractions - 0.1, -fractions, -fractions + 0.3])


class ToyStructures:
    """Cubes with the atoms of one formula unit on a line; chlorides fail."""

    name = "toy"
    is_reproducible = True

    def __init__(self):
        self.searched = []

    def search(self, composition, *, n, seed):
        self.searched.append((reduced_formula(composition), n, seed))
        if 17 in composition:
            return RandomSearch(structures=(), failures=(f"{reduced_formula(composition)}, structure 0: lost",))
        numbers = [z for z, count in composition.items() for _ in range(count)]
        found = []
        for index in range(n):
            edge = 3.0 * len(numbers) + index
            coords = [[i / len(numbers), 0, 0] for i in range(len(numbers))]
            crystal = Crystal(edge * np.eye(3), numbers, coords)
            found.append(RandomStructure(crystal=crystal, index=index, space_group_number=1, formula_units=1, volume_factor=1.0))
        return RandomSearch(structures=tuple(found))

    def close(self):
        pass


@pytest.fixture
def hull():
    elements = [HullEntry(id=str(z), composition={z: 1}, e_form_per_atom=0.0) for z in ELEMENTS]
    return ConvexHull("pbe", [*elements, HullEntry(id="a", composition={3: 2, 8: 1}, e_form_per_atom=-0.9)])


@pytest.fixture
def pipeline():
    settings = CompositionalSettings(n_enumerated=60, n_formulas=5, n_structures=3, formulas=FormulaSettings(n_elements=(2,)))
    return CompositionalPipeline(ToyStructures(), settings)


def test_formulas_nearest_to_the_hull_are_chosen(pipeline, hull):
    choice = pipeline.choose_formulas(range(1, 90), ToyFormulas(), hull, seed=0, known_formulas=frozenset({"Na2O"}))
    assert len(choice.chosen) == 5
    assert choice.n_predicted == choice.n_enumerated <= 60
    energies = [prediction.decomposition_energy for prediction in choice.chosen]
    assert energies == sorted(energies)
    for prediction in choice.chosen:
        assert set(prediction.composition) <= ELEMENTS
        assert prediction.reduced_formula != "Na2O"
        fraction = prediction.composition.get(8, 0) / sum(prediction.composition.values())
        assert prediction.e_form_per_atom == pytest.approx(-fraction)
        assert prediction.spread == pytest.approx(0.2)
        assert prediction.method == "pbe"
    assert (
        choice.chosen
        == pipeline.choose_formulas(ELEMENTS, ToyFormulas(), hull, seed=0, known_formulas=frozenset({"Na2O"})).chosen
    )


def test_threshold_and_filling(hull):
    predictions = screen_formulas([{11: 1, 17: 1}, {3: 2, 8: 1}, {3: 1, 8: 1}, {79: 1, 8: 1}], ToyFormulas(), hull)
    assert [p.reduced_formula for p in predictions] == ["NaCl", "Li2O", "Li2O2"]  # gold is left out
    assert [p.decomposition_energy for p in predictions] == pytest.approx([0.0, -1 / 3, 0.175])
    assert [p.reduced_formula for p in select_formulas(predictions, 5, fill=False)] == ["Li2O", "NaCl"]
    assert [p.reduced_formula for p in select_formulas(predictions, 5)] == ["Li2O", "NaCl", "Li2O2"]
    assert [p.reduced_formula for p in select_formulas(predictions, 1)] == ["Li2O"]
    assert screen_formulas([], ToyFormulas(), hull) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e6])
def test_absurd_predictions_are_left_out(hull, value):
    class Broken(ToyFormulas):
        def member_energies(self, compositions):
            energies = super().member_energies(compositions)
            energies[:, 0] = value
            return energies

    assert [p.reduced_formula for p in screen_formulas([{3: 2, 8: 1}, {11: 1, 17: 1}], Broken(), hull)] == ["NaCl"]


def test_two_methods_meet_through_an_offset_only(pipeline):
    hull = ConvexHull("chgnet", [HullEntry(id=str(z), composition={z: 1}, e_form_per_atom=0.0) for z in ELEMENTS])
    model = ToyFormulas()
    with pytest.raises(InvalidInput, match="an offset between them is needed"):
        pipeline.choose_formulas(ELEMENTS, model, hull, seed=0)
    known = [{3: 2, 8: 1}, {11: 1, 17: 1}, {19: 1, 35: 1}, {79: 1}]
    offset = fit_formula_offset(model, known, [-1 / 3 - 0.2, -0.2, -0.2, 9.0], method="chgnet")
    choice = pipeline.choose_formulas(ELEMENTS, model, hull, seed=0, offset=offset)
    assert choice.chosen[0].method == "pbe~chgnet"
    assert "3 known crystals" in choice.offset_note
    predicted = screen_formulas([{11: 1, 17: 1}], model, hull, offset)
    assert predicted[0].e_form_per_atom == pytest.approx(-0.2, abs=1e-6)
    with pytest.raises(InvalidInput, match="no known composition"):
        fit_formula_offset(model, [{79: 1}], [0.0], method="chgnet")


def test_candidates_carry_their_lineage_and_failures_lose_nothing(pipeline):
    compositions = [{11: 1, 17: 1}, {3: 2, 8: 1}, {19: 1, 35: 1}]
    candidates = list(pipeline.propose(compositions, limit=100, seed=9))
    assert [c.crystal.reduced_formula for c in candidates] == ["Li2O"] * 3 + ["KBr"] * 3
    assert pipeline.failures == ["NaCl, structure 0: lost"]
    assert candidates[1].lineage.to_dict() == {
        "generator": "compositional",
        "parent_id": None,
        "parameters": {
            "structures": "toy",
            "formula": "Li2O",
            "index": 1,
            "formula_units": 1,
            "space_group_number": 1,
            "volume_factor": 1.0,
        },
        "seed": 9,
    }
    assert len({c.id for c in candidates}) == 6
    assert Candidate.from_dict(candidates[0].to_dict()).id == candidates[0].id


def test_limit_is_kept_and_nothing_is_searched_in_vain(pipeline):
    candidates = list(pipeline.propose([{3: 2, 8: 1}, {19: 1, 35: 1}, {11: 2, 8: 1}], limit=4, seed=0))
    assert [c.crystal.reduced_formula for c in candidates] == ["Li2O"] * 3 + ["KBr"]
    assert pipeline.structures.searched == [("Li2O", 3, 0), ("KBr", 1, 0)]
    assert list(pipeline.propose([], limit=4, seed=0)) == []
