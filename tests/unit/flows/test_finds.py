"""What a round found, told from the tables by other means than the program's."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from emt_world import copy_world, l1_0, l1_2, round_settings
from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
from pymatgen.core import Composition

from flows.assess import hits_among, hits_of_round
from flows.finds import GROUPS, doubts_of, finds
from flows.importing import import_crystals
from flows.stages import run_round
from flows.workspace import Workspace, open_workspace
from gnome.crystals.formats import ReadCrystal
from gnome.crystals.writers import write_crystals
from gnome.database.query import query
from gnome.database.records import CandidateRecord, EvaluationRecord, RoundRecord
from gnome.stability.method import Method
from pipelines.standing import Doubt

THEIRS = (("Pt", "Cu"), ("Cu", "Pt"))
"""L1_2 compounds, one of the first and three of the second, that are known under another method before the round."""


@pytest.fixture(scope="module")
def played(emt_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, RoundRecord]]:
    """A round in a database that knows two compositions under another method, with the energies that came with them."""
    folder = tmp_path_factory.mktemp("finds")
    settings = copy_world(emt_world, folder)
    items = [ReadCrystal(label=f"{b}3{a}", crystal=l1_2(a, b), fields={"e_form_per_atom": -0.1}) for a, b in THEIRS]
    items.append(ReadCrystal(label="CuPt", crystal=l1_0("Cu", "Pt"), fields={"e_form_per_atom": -0.2}))
    write_crystals(folder / "theirs.extxyz", items)
    with open_workspace(settings) as workspace:
        imported = import_crystals(workspace, folder / "theirs.extxyz", method_name="theirs")
        assert imported.n_imported == len(items), imported.refused
        yield workspace, run_round(workspace, round_settings())


@pytest.fixture(scope="module")
def rows(played: tuple[Workspace, RoundRecord]) -> list[dict[str, Any]]:
    return finds(played[0].store, played[1])


def distance(diagram: PhaseDiagram, entry: PDEntry) -> float:
    return float(diagram.get_decomp_and_e_above_hull(entry, allow_negative=True)[1] or 0.0)


def test_every_new_crystal_is_told_once(played: tuple[Workspace, RoundRecord], rows: list[dict[str, Any]]) -> None:
    workspace, record = played
    assert record.summary is not None
    assert {row["id"] for row in rows} == {row["id"] for row in query(workspace.store, "_gnome_round = 1")}
    assert len(rows) == record.summary["n_novel"] >= 4
    assert all(row["parent_formula"] for row in rows)


def test_hits_are_those_that_another_hull_finds(played: tuple[Workspace, RoundRecord], rows: list[dict[str, Any]]) -> None:
    """Recomputed by pymatgen from the crystals that the tables hold: new, on the hull with all finds, beside a compound."""
    workspace, record = played
    method = workspace.evaluator.method.label
    entries = {}
    for row in query(workspace.store, ""):
        if row["method"] == method:
            composition = Composition(row["reduced_formula"])
            e_form = row["e_form_per_atom"] if len(composition) > 1 else 0.0  # an element is its own reference
            entries[row["id"]] = PDEntry(composition, e_form * composition.num_atoms)
    diagram = PhaseDiagram(entries.values())
    known = PhaseDiagram([entry for name, entry in entries.items() if name not in {row["id"] for row in rows}])
    hits, supported = {}, {}
    for row in rows:
        own = entries[row["id"]]
        others = PhaseDiagram([entry for entry in entries.values() if entry.composition != own.composition])
        near = {
            entry.composition
            for entry in others.all_entries
            if len(entry.composition) > 1 and set(entry.composition) <= set(own.composition) and distance(others, entry) <= 0.1
        }
        assert row["e_above_hull"] == pytest.approx(max(0.0, diagram.get_e_above_hull(own)), abs=1e-8)
        assert row["n_competing"] == len(near), row["reduced_formula"]
        before = [
            entry
            for entry in known.all_entries
            if len(entry.composition) > 1 and set(entry.composition) <= set(own.composition) and distance(known, entry) <= 0.1
        ]
        supported[row["id"]] = bool(before)
        assert row["n_competing_before"] == len({entry.composition for entry in before})
        if before and row["e_above_hull"] <= 1e-3:
            lowest = hits.get(row["reduced_formula"])
            if lowest is None or row["e_form_per_atom"] < lowest["e_form_per_atom"]:
                hits[row["reduced_formula"]] = row
    assert hits, "a world in which nothing is found tests nothing"
    assert not all(supported.values())
    found = sorted(row["id"] for row in hits.values())
    assert record.summary is not None
    assert sorted(row["id"] for row in rows if row["is_hit"]) == found == record.summary["hits"]
    assert hits_of_round(workspace.store, 1, method) == found
    assert record.summary["hit_rate"] == len(found) / record.summary["n_evaluated"]
    assert {row["id"]: row["supported"] for row in rows} == supported


def test_groups_stand_in_order_and_are_what_they_say(rows: list[dict[str, Any]]) -> None:
    order = [GROUPS.index(row["group"]) for row in rows]
    assert order == sorted(order)
    assert len(set(order)) >= 3
    for row in rows:
        near = row["e_above_hull"] <= 0.05
        expected = "other" if not near else "doubtful" if row["doubts"] else "hit" if row["is_hit"] else "near the hull"
        assert row["group"] == expected
    for name in GROUPS:
        sure = [-(row["p_stable"] or 0.0) for row in rows if row["group"] == name]
        assert sure == sorted(sure), "the surest first"


def test_doubts_are_words_for_what_the_row_shows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        expected = [
            (row["n_competing_before"] == 0, "no known compound competes"),
            (row["formula_check"] is not None and row["formula_check"] < 0.3, "its formula is not expected to be stable"),
            (row["p_stable"] is not None and row["p_stable"] < 0.5, "the ensemble does not expect it to be stable"),
        ]
        assert row["doubts"] == [words for holds, words in expected if holds]
        assert all(type(words) is str for words in row["doubts"])
    assert any(row["doubts"] for row in rows)
    assert any(row["formula_check"] is not None for row in rows)


def test_compositions_that_another_method_knew_say_which(
    played: tuple[Workspace, RoundRecord], rows: list[dict[str, Any]]
) -> None:
    """They are new to the round's own hull all the same."""
    (label,) = played[0].store.methods().keys() - {played[0].evaluator.method.label}
    known = {Composition(formula).reduced_formula for formula in ("Cu3Pt", "Pt3Cu", "CuPt")}
    there = {row["reduced_formula"]: row["known_in"] for row in rows}
    assert {formula for formula, methods in there.items() if methods} == known & there.keys() != set()
    assert {tuple(methods) for methods in there.values()} == {(), (label,)}


def test_what_was_let_through_unbalanced_is_doubted(rows: list[dict[str, Any]], played: tuple[Workspace, RoundRecord]) -> None:
    (row, *_) = rows
    candidate: CandidateRecord = played[0].store.candidates([row["candidate_id"]])[row["candidate_id"]]
    plain = {**row, "n_competing_before": 3, "formula_check": 0.9, "p_stable": 0.9}
    assert doubts_of(plain, candidate) == ()
    assert doubts_of(plain, replace(candidate, parameters={"charge_balanced": False})) == (Doubt.CHARGES,)
    assert doubts_of({**plain, "p_stable": 0.49}, None) == (Doubt.ENSEMBLE,)
    assert doubts_of({**plain, "n_competing_before": None}, candidate) == (Doubt.ELEMENTS_ONLY,)


METHOD = Method(code="m", functional="f")


def evaluation(name: str, **changes: Any) -> EvaluationRecord:
    good: dict[str, Any] = {
        "candidate_id": f"of {name}", "method": METHOD, "round": 1, "converged": True, "novel": True, "crystal_id": name,
        "energy_per_atom": -3.0, "e_form_per_atom": -1.0,
    }  # fmt: skip
    return EvaluationRecord(**{**good, **changes})


def crystal(name: str, formula: str, e_form: float = -1.0, above: float | None = 0.0, n: int | None = 1) -> dict[str, Any]:
    return {"id": name, "reduced_formula": formula, "e_form_per_atom": e_form, "e_above_hull": above, "n_competing": n}


def hits(*pairs: tuple[EvaluationRecord, dict[str, Any]]) -> list[str]:
    competing = {record.candidate_id: row["n_competing"] or 0 for record, row in pairs}
    return hits_among([record for record, _ in pairs], {row["id"]: row for _, row in pairs}, competing)


def test_a_composition_counts_once_by_its_lowest() -> None:
    pairs = [
        (evaluation("b"), crystal("b", "NaCl", -1.0000)),
        (evaluation("a"), crystal("a", "NaCl", -1.0005)),
        (evaluation("c"), crystal("c", "NaCl", -1.0005)),
        (evaluation("d"), crystal("d", "KCl")),
    ]
    assert hits(*pairs) == hits(*pairs[::-1]) == ["a", "d"]


@pytest.mark.parametrize(
    ("record", "row"),
    [
        (evaluation("a"), crystal("a", "NaCl", n=0)),
        (evaluation("a"), crystal("a", "NaCl", n=None)),
        (evaluation("a"), crystal("a", "NaCl", above=0.0011)),
        (evaluation("a"), crystal("a", "NaCl", above=None)),
        (evaluation("a", novel=False), crystal("a", "NaCl")),
        (evaluation("a", novel=None), crystal("a", "NaCl")),
        (evaluation("a", crystal_id=None), crystal("a", "NaCl")),
        (evaluation("a", crystal_id="elsewhere"), crystal("a", "NaCl")),
        (evaluation("a", converged=False, failure="timeout"), crystal("a", "NaCl")),
    ],
    ids=[
        "elements alone", "competitors unknown", "above the hull", "never placed", "known", "not assessed", "no crystal",
        "crystal not there", "failed",
    ],
)  # fmt: skip
def test_what_is_no_hit(record: EvaluationRecord, row: dict[str, Any]) -> None:
    good = (evaluation("z"), crystal("z", "KCl", above=0.001))
    assert hits((record, row), good) == ["z"]
