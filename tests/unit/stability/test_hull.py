"""The hull against pymatgen's phase diagrams and a linear program written the other way round (its dual)."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
from pymatgen.core import Composition
from scipy.optimize import linprog
from scipy.spatial import ConvexHull as QuickHull
from scipy.spatial import QhullError

from gnome.crystals.elements import SYMBOLS
from gnome.errors import InvalidInput
from gnome.stability import lower_hull
from gnome.stability.hull import ConvexHull, HullEntry, composition_key
from gnome.stability.references import ElementalReferences

FOLDER = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "chemsys"
FILES = [
    "Cl-Mn-Na-O-Y_computed_structure_entries.jsonl.gz",
    "Fe-Li-O-P_computed_structure_entries.jsonl.gz",
    "Li-Fe-O_emmet_computed_structure_entries.jsonl.gz",
    "Li-Fe-P-O_pymatgen_computed_entries.jsonl.gz",
    "Mn-O-Y_computed_structure_entries.jsonl.gz",
]
LI, OXYGEN, NA, CL, FE = 3, 8, 11, 17, 26


@pytest.fixture(scope="module", params=FILES)
def entries(request: pytest.FixtureRequest) -> list[HullEntry]:
    path = FOLDER / request.param
    if not path.exists():
        pytest.skip(f"the Materials Project entries are not here: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return formation_entries([json.loads(line) for line in file])


def formation_entries(rows: list[dict[str, Any]]) -> list[HullEntry]:
    """Entries with energies from the elements of the same file; a row's number goes into its id, as ids may come twice."""
    numbers = {symbol: z for z, symbol in enumerate(SYMBOLS)}
    compositions = [{numbers[symbol]: round(amount) for symbol, amount in row["composition"].items()} for row in rows]
    energies = [
        (row["energy"] if "energy" in row else row["energy_uncorrected"]) / sum(composition.values())
        for row, composition in zip(rows, compositions, strict=True)
    ]
    corrections = [row["correction"] / sum(composition.values()) for row, composition in zip(rows, compositions, strict=True)]
    lowest: dict[int, float] = {}
    for composition, energy, correction in zip(compositions, energies, corrections, strict=True):
        if len(composition) == 1:
            (z,) = composition
            lowest[z] = min(lowest.get(z, math.inf), energy + correction)
    references = ElementalReferences(method="mp", energies=lowest)
    return [
        HullEntry(
            id=f"{i}:{row['entry_id']}",
            composition=composition,
            e_form_per_atom=references.formation_energy_per_atom(composition, energy, correction),
        )
        for i, (row, composition, energy, correction) in enumerate(zip(rows, compositions, energies, corrections, strict=True))
    ]


def to_pymatgen(composition: Any) -> Composition:
    return Composition({SYMBOLS[z]: amount for z, amount in composition.items()})


def phase_diagram(entries: list[HullEntry]) -> PhaseDiagram:
    return PhaseDiagram(
        [PDEntry(c := to_pymatgen(entry.composition), entry.e_form_per_atom * c.num_atoms, name=entry.id) for entry in entries]
    )


def dual_energy(entries: list[HullEntry], composition: Any) -> float:
    """Hull energy as the largest mu . x that lies above no entry and no element: the dual of the decomposition problem."""
    elements = sorted(composition)
    inside = [entry for entry in entries if set(entry.composition) <= set(elements)]
    rows = [[entry.composition.get(z, 0) / sum(entry.composition.values()) for z in elements] for entry in inside]
    limits = [entry.e_form_per_atom if len(entry.composition) > 1 else 0.0 for entry in inside]
    x = np.array([composition[z] for z in elements]) / sum(composition.values())
    answer = linprog(
        -x,
        A_ub=np.vstack([rows, np.eye(len(elements))]) if rows else np.eye(len(elements)),
        b_ub=np.concatenate([limits, np.zeros(len(elements))]),
        bounds=(None, None),
        method="highs-ipm",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10, "ipm_optimality_tolerance": 1e-12},
    )
    assert answer.success
    return float(-answer.fun)


def random_compositions(elements: list[int], n: int) -> list[dict[int, int]]:
    rng = np.random.default_rng(7)
    compositions = []
    for _ in range(n):
        chosen = rng.choice(elements, size=rng.integers(1, len(elements) + 1), replace=False)
        compositions.append({int(z): int(rng.integers(1, 9)) for z in chosen})
    return compositions


def test_hull_energies_agree_with_pymatgen_and_the_dual_program(entries: list[HullEntry]) -> None:
    hull = ConvexHull("mp", entries)
    reference = phase_diagram(entries)
    compositions = [entry.composition for entry in entries] + random_compositions(sorted(hull.elements), 100)
    energies = hull.energies(compositions)
    theirs = [reference.get_hull_energy_per_atom(to_pymatgen(composition)) for composition in compositions]
    np.testing.assert_allclose(energies, theirs, rtol=0, atol=1e-8)
    some = range(0, len(compositions), max(1, len(compositions) // 60))
    np.testing.assert_allclose(energies[some], [dual_energy(entries, compositions[i]) for i in some], rtol=0, atol=1e-8)
    assert {entry.id for entry in hull.stable(1e-9)} >= {entry.name for entry in reference.stable_entries}


def brute_competing(entries: list[HullEntry], composition: Any, within: float) -> int:
    """Count reduced compositions one entry at a time, each against the dual program of all entries but the asked composition's."""
    own = to_pymatgen(composition).reduced_formula
    entries = [entry for entry in entries if to_pymatgen(entry.composition).reduced_formula != own]
    found = set()
    for entry in entries:
        formula = to_pymatgen(entry.composition).reduced_formula
        if formula == own or len(entry.composition) < 2 or not set(entry.composition) <= set(composition):
            continue
        if max(entry.e_form_per_atom - dual_energy(entries, entry.composition), 0.0) <= within:
            found.add(formula)
    return len(found)


def test_competing_compounds_agree_with_a_count_one_by_one(entries: list[HullEntry]) -> None:
    hull = ConvexHull("mp", entries)
    elements = sorted(hull.elements)
    compositions = [dict.fromkeys(elements[:3], 2), entries[-1].composition, {elements[-1]: 1, elements[0]: 2}]
    for composition in compositions:
        assert hull.n_competing(composition) == brute_competing(entries, composition, 0.1)
        assert hull.n_competing(composition, within=0.0) == brute_competing(entries, composition, 1e-9)


def test_competing_compounds_count_once_without_elements_and_the_composition_itself() -> None:
    hull = ConvexHull(
        "m",
        [
            HullEntry(id="Li2O", composition={LI: 2, OXYGEN: 1}, e_form_per_atom=-2.0),
            HullEntry(id="Li4O2", composition={LI: 4, OXYGEN: 2}, e_form_per_atom=-1.9),
            HullEntry(id="Li2O2", composition={LI: 2, OXYGEN: 2}, e_form_per_atom=-1.45),  # 0.05 above the line Li2O to O
            HullEntry(id="LiO8", composition={LI: 1, OXYGEN: 8}, e_form_per_atom=0.3),
            HullEntry(id="O2", composition={OXYGEN: 2}, e_form_per_atom=0.02),
            HullEntry(id="NaCl", composition={NA: 1, CL: 1}, e_form_per_atom=-2.0),
        ],
    )
    assert hull.n_competing({LI: 1, OXYGEN: 3}) == 2
    assert hull.n_competing({LI: 1, OXYGEN: 3}, within=0.04) == 1
    assert hull.n_competing({LI: 1, OXYGEN: 3}, within=math.inf) == 3
    assert hull.n_competing({LI: 6, OXYGEN: 3}) == 1, "Li2O itself does not count"
    assert hull.n_competing({LI: 1, FE: 1, OXYGEN: 2}) == 2
    assert hull.n_competing({LI: 1, NA: 1}) == hull.n_competing({OXYGEN: 2}) == 0
    hull.add([HullEntry(id="LiO3", composition={LI: 1, OXYGEN: 3}, e_form_per_atom=-3.0)])  # lifts Li2O2 off the hull
    assert hull.n_competing({LI: 1, OXYGEN: 3}) == 2, "it does not lift its own competitors"
    assert hull.n_competing({LI: 1, OXYGEN: 2}) == 2, "LiO3 and Li2O: what was counted before is forgotten"
    with pytest.raises(InvalidInput, match="nan eV/atom"):
        hull.n_competing({LI: 1, OXYGEN: 3}, within=math.nan)


def test_decomposition_energies_agree_with_pymatgen(entries: list[HullEntry]) -> None:
    hull = ConvexHull("mp", entries)
    lowest: dict[Any, HullEntry] = {}
    for entry in entries:
        key = composition_key(entry.composition)
        if len(key) > 1 and (key not in lowest or entry.e_form_per_atom < lowest[key].e_form_per_atom):
            lowest[key] = entry
    checked = [*list(lowest.values())[:12], *hull.stable(0.0)[:20]]
    checked = [entry for entry in checked if len(entry.composition) > 1]
    ours = hull.decomposition_energies([entry.composition for entry in checked], [entry.e_form_per_atom for entry in checked])
    for entry, energy in zip(checked, ours, strict=True):
        key = composition_key(entry.composition)
        others = [
            other
            for other in entries
            if composition_key(other.composition) != key and set(other.composition) <= set(entry.composition)
        ]
        competing = phase_diagram(others).get_hull_energy_per_atom(to_pymatgen(entry.composition))
        assert energy == pytest.approx(entry.e_form_per_atom - competing, abs=1e-8)
    assert (ours < 0).any()


def test_products_give_back_composition_and_energy(entries: list[HullEntry]) -> None:
    hull = ConvexHull("mp", entries)
    known = {entry.id: entry for entry in entries}
    for competing_only in (False, True):
        for composition in [entry.composition for entry in entries[::5]] + random_compositions(sorted(hull.elements), 60):
            products = hull.decomposition(composition, competing_only=competing_only)
            total = sum(composition.values())
            mixture = dict.fromkeys(composition, 0.0)
            energy = 0.0
            for product in products:
                assert product.fraction > 0
                entry = known[product.id]
                assert to_pymatgen(entry.composition).reduced_formula == product.reduced_formula
                for z, amount in entry.composition.items():
                    mixture[z] += product.fraction * amount / sum(entry.composition.values())
                energy += product.fraction * (entry.e_form_per_atom if len(entry.composition) > 1 else 0.0)
            assert sum(product.fraction for product in products) == pytest.approx(1.0, abs=1e-12)
            assert mixture == pytest.approx({z: amount / total for z, amount in composition.items()}, abs=1e-9)
            expected = -hull.decomposition_energy(composition, 0.0) if competing_only else hull.energy(composition)
            assert energy == pytest.approx(expected, abs=1e-9)
            if competing_only and len(composition_key(composition)) > 1:
                assert composition_key(composition) not in {
                    composition_key(known[product.id].composition) for product in products
                }


def test_the_linear_program_agrees_with_the_planes(entries: list[HullEntry], monkeypatch: pytest.MonkeyPatch) -> None:
    compositions = random_compositions(sorted({z for entry in entries for z in entry.composition}), 40)
    planes = ConvexHull("mp", entries)
    expected = planes.energies(compositions)
    assert all(system.hull.potentials is not None for system in planes._systems.values())
    monkeypatch.setattr(lower_hull, "MAX_QHULL_ELEMENTS", 1)
    programs = ConvexHull("mp", entries)
    np.testing.assert_allclose(programs.energies(compositions), expected, rtol=0, atol=1e-9)
    assert any(system.hull.potentials is None for system in programs._systems.values())
    for composition in compositions[:10]:
        assert sum(product.fraction for product in programs.decomposition(composition)) == pytest.approx(1.0)
    stable = [entry for entry in planes.stable(0.0) if len(entry.composition) > 1][:8]
    formulas, energies = [entry.composition for entry in stable], [entry.e_form_per_atom for entry in stable]
    np.testing.assert_allclose(
        programs.decomposition_energies(formulas, energies), planes.decomposition_energies(formulas, energies), rtol=0, atol=1e-9
    )


class _Incomplete:
    """Stands for Qhull and leaves out a facet of the lower hull."""

    def __init__(self, points: Any) -> None:
        hull = QuickHull(points)
        lower = np.flatnonzero(hull.equations[:, -2] < 0)
        self.simplices, self.equations = np.delete(hull.simplices, lower[0], 0), np.delete(hull.equations, lower[0], 0)


class _Cutting:
    """Stands for Qhull and overlooks the lowest point, so that a facet lies above it."""

    def __init__(self, points: Any) -> None:
        lowest = int(points[:, -1].argmin())
        kept = np.delete(np.arange(len(points)), lowest)
        hull = QuickHull(points[kept])
        self.simplices, self.equations = kept[hull.simplices], hull.equations


def _failing(_points: Any) -> Any:
    raise QhullError("initial simplex is flat")


@pytest.mark.parametrize("broken", [_Incomplete, _Cutting, _failing])
def test_an_answer_of_qhull_that_cannot_be_trusted_is_not_used(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [entry("a", {NA: 1, CL: 1}, -2.0), entry("b", {NA: 2, CL: 1}, -1.5), entry("c", {NA: 1, CL: 1, LI: 1}, -1.6)]
    compositions: list[dict[int, int]] = [{NA: 1, CL: 1, LI: 1}, {NA: 3, CL: 2, LI: 1}, {NA: 2, CL: 1}, {NA: 1, CL: 1}]
    expected = ConvexHull("m", entries).energies(compositions)
    monkeypatch.setattr(lower_hull, "QuickHull", broken)
    doubtful = ConvexHull("m", entries)
    np.testing.assert_allclose(doubtful.energies(compositions), expected, rtol=0, atol=1e-9)
    assert doubtful._systems[frozenset({NA, CL, LI})].hull.potentials is None


def test_six_elements_go_to_the_linear_program() -> None:
    elements = [3, 8, 9, 11, 12, 17]
    compound = dict.fromkeys(elements, 1)
    hull = ConvexHull("m", [HullEntry(id="six", composition=compound, e_form_per_atom=-1.2), entry("LiF", {3: 1, 9: 1}, -3.0)])
    assert hull.energy(compound) == pytest.approx(-1.2)
    assert hull.decomposition_energy(compound, -1.2) == pytest.approx(-1.2 + 3.0 * 2 / 6)
    products = hull.decomposition({**compound, 3: 2})
    assert [product.id for product in products] == ["six", ""]
    assert [product.fraction for product in products] == pytest.approx([6 / 7, 1 / 7])
    assert products[1].reduced_formula == "Li"


def entry(name: str, composition: dict[int, int], e_form: float, method: str | None = None) -> HullEntry:
    return HullEntry(id=name, composition=composition, e_form_per_atom=e_form, method=method)


def test_a_binary_hull_by_hand() -> None:
    hull = ConvexHull(
        "m", [entry("NaCl", {NA: 4, CL: 4}, -2.0), entry("Na2Cl", {NA: 2, CL: 1}, -1.0), entry("NaCl-b", {NA: 1, CL: 1}, -1.9)]
    )
    assert hull.energy({NA: 1, CL: 1}) == -2.0
    assert hull.energy({NA: 2, CL: 1}) == pytest.approx(-4 / 3)
    assert hull.e_above_hull({NA: 2, CL: 1}, -1.0) == pytest.approx(1 / 3)
    assert hull.e_above_hull({NA: 1, CL: 1}, -2.5) == 0.0
    assert hull.decomposition_energy({NA: 1, CL: 1}, -2.0) == pytest.approx(-2.0 + 0.75)
    assert hull.decomposition_energy({NA: 1, CL: 1}, -1.9) == pytest.approx(
        -1.9 + 0.75
    )  # a polymorph does not compete with its like
    assert hull.decomposition_energy({NA: 3, CL: 1}, -1.2) == pytest.approx(-1.2 + 1.0)
    assert [entry.id for entry in hull.stable()] == ["NaCl"]
    assert [(p.id, p.reduced_formula, round(p.fraction, 9)) for p in hull.decomposition({NA: 2, CL: 1})] == [
        ("NaCl", "NaCl", round(2 / 3, 9)),
        ("", "Na", round(1 / 3, 9)),
    ]
    assert hull.elements == {NA, CL}
    assert [entry.method for entry in hull.entries] == ["m", "m", "m"]


def test_elements_stand_at_zero_whatever_their_entries_say() -> None:
    hull = ConvexHull("m", [entry("Na", {NA: 2}, -0.4), entry("Cl", {CL: 4}, 0.1), entry("NaCl", {NA: 1, CL: 1}, -1.0)])
    assert hull.energy({NA: 7}) == 0.0
    assert hull.energy({NA: 3, CL: 1}) == pytest.approx(-0.5)
    assert hull.decomposition_energy({NA: 1}, -0.4) == -0.4
    assert hull.decomposition({NA: 5})[0].id == "Na"
    assert [e.id for e in hull.stable()] == ["Na", "NaCl"]
    assert hull.energy({LI: 1, FE: 2}) == 0.0  # no entry at all: the elements


def test_unstable_compounds_leave_the_hull_at_the_elements() -> None:
    hull = ConvexHull("m", [entry("NaCl", {NA: 1, CL: 1}, 0.3)])
    assert hull.energy({NA: 1, CL: 1}) == 0.0
    assert hull.e_above_hull({NA: 1, CL: 1}, 0.3) == 0.3
    assert hull.decomposition_energy({NA: 1, CL: 1}, 0.3) == 0.3
    assert {product.reduced_formula for product in hull.decomposition({NA: 1, CL: 1})} == {"Na", "Cl2"}


def test_adding_lowers_the_systems_that_hold_the_composition_and_no_others() -> None:
    hull = ConvexHull("m", [entry("NaCl", {NA: 1, CL: 1}, -1.0), entry("Li2O", {LI: 2, OXYGEN: 1}, -1.0)])
    assert hull.energies([{NA: 1, CL: 1, LI: 2}, {LI: 2, OXYGEN: 1}, {NA: 1, CL: 1}]) == pytest.approx([-0.5, -1.0, -1.0])
    hull.decomposition_energy({NA: 1, CL: 1}, -1.0)
    kept = hull._systems[frozenset({LI, OXYGEN})]
    hull.add([entry("NaCl-2", {NA: 1, CL: 1}, -2.0), entry("Na3Cl", {NA: 3, CL: 1}, -1.4)])
    assert hull.energies([{NA: 1, CL: 1, LI: 2}, {LI: 2, OXYGEN: 1}, {NA: 1, CL: 1}]) == pytest.approx([-1.0, -1.0, -2.0])
    assert hull.decomposition_energy({NA: 1, CL: 1}, -2.0) == pytest.approx(-2.0 + 1.4 * 2 / 3)
    assert hull._systems[frozenset({LI, OXYGEN})] is kept


def test_entries_that_come_again_are_passed_over() -> None:
    first = entry("a", {NA: 1, CL: 1}, -1.0)
    hull = ConvexHull("m", [first, first])
    hull.add([entry("a", {NA: 2, CL: 2}, -1.0)])
    assert len(hull.entries) == 1
    with pytest.raises(InvalidInput, match="an id names one energy"):
        hull.add([entry("b", {NA: 1, CL: 1}, -1.1), entry("a", {NA: 1, CL: 1}, -1.1)])
    assert len(hull.entries) == 1  # all or none


def test_energies_of_two_methods_never_meet() -> None:
    hull = ConvexHull("chgnet", [entry("a", {NA: 1, CL: 1}, -1.0, "chgnet")])
    with pytest.raises(InvalidInput, match="'b' belongs to 'pbe', this is the hull of 'chgnet'"):
        hull.add([entry("b", {NA: 1, CL: 1}, -1.1, "pbe")])


@pytest.mark.parametrize("energy", [math.nan, math.inf, -math.inf, 1e6, -1e6, -6.1, 5.1])
def test_implausible_energies_are_refused(energy: float) -> None:
    with pytest.raises(InvalidInput, match="hull entry 'bad' has a formation energy of"):
        ConvexHull("m", [entry("good", {NA: 1, CL: 1}, -1.0), entry("bad", {NA: 1}, energy)])


@pytest.mark.parametrize("energy", [math.nan, math.inf])
def test_questions_about_what_is_not_a_number_are_refused(energy: float) -> None:
    hull = ConvexHull("m", [entry("good", {NA: 1, CL: 1}, -1.0)])
    for ask in (hull.e_above_hulls, hull.decomposition_energies):
        with pytest.raises(InvalidInput, match="formation energy number 1 is"):
            ask([{NA: 1}, {NA: 1, CL: 1}], [0.0, energy])
    with pytest.raises(InvalidInput, match="2 compositions come with energies of shape"):
        hull.e_above_hulls([{NA: 1}, {CL: 1}], [0.0])


@pytest.mark.parametrize("composition", [{}, {NA: 0}, {NA: -1}, {NA: 1.5}, {0: 1}, {200: 1}])
def test_compositions_that_are_none_are_refused(composition: Any) -> None:
    with pytest.raises(InvalidInput, match="composition"):
        ConvexHull("m").energy(composition)


def test_an_empty_hull_is_flat() -> None:
    hull = ConvexHull("m")
    assert hull.elements == frozenset()
    assert hull.stable() == ()
    assert hull.energies([]).shape == (0,)
    assert hull.energy({LI: 1, FE: 1, OXYGEN: 2}) == 0.0
