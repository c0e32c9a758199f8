import math
from typing import Any

import numpy as np
import pytest
from database_rows import CHGNET, EMT, answer, candidate, crystal, model, seed
from sqlalchemy import text

from gnome.crystals.crystal import Crystal
from gnome.database import connection as connection_module
from gnome.database import crystal_store
from gnome.database.candidate_store import MAX_FAILED
from gnome.database.records import Assessment, CrystalRecord, EvaluationRecord, HullColumns, PredictionRecord
from gnome.database.store import Store
from gnome.errors import DatabaseUnavailable, InvalidInput, RoundBusy
from gnome.stability.entries import Product
from gnome.stability.hull import ConvexHull
from gnome.stability.method import Method


def test_duplicate_crystals_are_stored_once_a_method(store: Store) -> None:
    first, second = seed(4.0), seed(4.1)
    assert store.add_crystals([first, second, first]) == 2
    assert store.add_crystals([second, seed(4.2)]) == 1
    assert store.add_crystals([seed(4.0, method=EMT)]) == 1
    counts = store.counts()
    assert counts["crystals"] == 4
    assert counts["crystal_elements"] == 8
    assert set(store.methods()) == {CHGNET.label, EMT.label}


def test_a_crystal_comes_back_with_every_field(store: Store) -> None:
    store.start_round({}, 1)
    store.add_candidates([candidate("c1", parent_id="p", parameters={"Na": "K"})])
    record = seed(
        5.0, ("K", "K", "Cl", "Cl"), method=EMT, energy_per_atom=-4.5, correction_per_atom=0.25, e_above_hull=0.0,
        decomposition_energy=-0.5,
        decomposes_to=[Product(id="", reduced_formula="K", fraction=1.0)], origin="discovered", round=1, candidate_id="c1",
        space_group_number=225, protostructure="AB_cF8_225_a_b:Cl-K", source="round 1", n_competing=3, p_stable=0.75, formula_check=0.5,
    )  # fmt: skip
    store.add_crystals([record])
    found = store.crystal(record.crystal.id)
    assert found.crystal == record.crystal
    expected = {
        "id": record.crystal.id, "method": EMT.label, "reduced_formula": "KCl", "chemical_formula_reduced": "ClK",
        "chemical_formula_anonymous": "AB", "chemical_system": "Cl-K", "n_elements": 2, "n_atoms": 4,
        "volume_per_atom": pytest.approx(31.25),
        "space_group_number": 225, "protostructure": "AB_cF8_225_a_b:Cl-K", "fingerprint": record.fingerprint, "energy_per_atom": -4.5,
        "correction_per_atom": 0.25, "correction_scheme": "mp2020", "correction_version": "1", "e_form_per_atom": -2.0, "e_above_hull": 0.0,
        "decomposition_energy": -0.5, "decomposes_to": [{"id": "", "reduced_formula": "K", "fraction": 1.0}], "origin": "discovered",
        "round": 1, "candidate_id": "c1", "source": "round 1", "parent": "p", "generator": "substitution", "versions": {},
        "n_competing": 3, "p_stable": 0.75, "formula_check": 0.5,
    }  # fmt: skip
    assert {name: value for name, value in found.row.items() if name != "created_at"} == expected
    assert found.row["created_at"] > 1.7e9


def test_look_ups_find_by_bucket_and_method(store: Store) -> None:
    store.add_crystals([seed(4.0), seed(4.1), seed(4.0, method=EMT), seed(4.0, ("Mg", "O"))])
    bucket = seed(4.1).fingerprint
    assert [s.id for s in store.crystals_by_fingerprint([bucket, "none"])[bucket]] == [seed(4.1).crystal.id]
    assert [s.row["method"] for s in store.crystals_by_id([seed(4.0).crystal.id], EMT.label)[seed(4.0).crystal.id]] == [EMT.label]
    with pytest.raises(InvalidInput, match="no crystal 'abc'"):
        store.crystal("abc")


def test_reading_goes_over_many_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crystal_store, "CHUNK", 3)
    monkeypatch.setattr(connection_module, "CHUNK", 3)
    records = [seed(4.0 + i / 10) for i in range(10)]
    store.add_crystals(records)
    assert [found.id for found in store.crystals_of(CHGNET.label)] == [record.crystal.id for record in records]
    assert len(store.crystals_by_id(record.crystal.id for record in records)) == 10


def test_crystals_of_a_method_are_listed_up_to_a_round(store: Store) -> None:
    store.start_round({}, 1)
    store.add_crystals(
        [
            seed(4.0, e_above_hull=0.0),
            seed(4.1, e_above_hull=0.3),
            seed(4.2),
            seed(4.3, origin="discovered", round=1, e_above_hull=0.0),
            seed(4.4, method=EMT, e_above_hull=0.0),
        ]
    )

    def edges(**limits: Any) -> list[float]:
        return [round(float(found.crystal.lattice[0, 0]), 1) for found in store.crystals_of(CHGNET.label, **limits)]

    assert edges() == [4.0, 4.1, 4.2, 4.3]
    assert edges(before_round=1) == [4.0, 4.1, 4.2]


def test_hull_entries_and_columns_go_round(store: Store) -> None:
    store.add_crystals(
        [seed(4.0), seed(4.1, e_form_per_atom=-1.5), seed(4.2, ("Na", "Na", "Cl"), e_form_per_atom=-1.0), seed(4.0, method=EMT)]
    )
    hull = ConvexHull(CHGNET.label, store.hull_entries(CHGNET.label))
    assert [(entry.composition, entry.e_form_per_atom) for entry in hull.entries] == [
        ({11: 1, 17: 1}, -2.0),
        ({11: 1, 17: 1}, -1.5),
        ({11: 2, 17: 1}, -1.0),
    ]
    rows = [
        HullColumns(
            id=entry.id,
            e_above_hull=hull.e_above_hull(entry.composition, entry.e_form_per_atom),
            decomposition_energy=hull.decomposition_energy(entry.composition, entry.e_form_per_atom),
            decomposes_to=hull.decomposition(entry.composition),
            n_competing=hull.n_competing(entry.composition),
        )
        for entry in hull.entries
    ]
    assert store.update_hull_columns(CHGNET.label, rows) == 3
    found = [stored.row for stored in store.crystals_of(CHGNET.label)]
    assert [row["e_above_hull"] for row in found] == pytest.approx([0.0, 0.5, 1 / 3])
    assert found[0]["decomposition_energy"] == pytest.approx(-2.0 + 0.75)  # against Na2Cl and Cl2
    assert store.crystal(seed(4.0).crystal.id, EMT.label).row["e_above_hull"] is None
    assert store.update_hull_columns(CHGNET.label, []) == 0


def test_answers_of_a_round_are_stored_once_and_counted_once(store: Store) -> None:
    store.start_round({}, 1)
    candidates = [candidate("c1"), candidate("c02"), candidate("c003", symbols=("Li", "F"))]
    assert store.add_candidates([*candidates, candidates[0]]) == 3
    assert store.add_candidates(candidates) == 0
    store.add_model(model("m1"))
    predictions = [
        PredictionRecord(candidate_id=c.id, model_id="m1", e_form_per_atom=-1.0, spread=0.1, volume_scale=0.9) for c in candidates
    ]
    assert store.add_predictions(predictions) == 3
    assert store.add_predictions(predictions) == 0
    discovered = seed(5.1, ("K", "Cl"), origin="discovered", round=1, candidate_id="c1")
    store.add_crystals([discovered])
    answers = [
        answer(
            "c1",
            crystal_id=discovered.crystal.id,
            novel=True,
            e_above_hull_before=-0.2,
            forces=[[0.1, 0.0, -0.2]],
            n_steps=12,
        ),
        answer(
            "c02",
            converged=False,
            failure="timeout",
            message="gave\x00up",
            energy_per_atom=math.nan,
            e_form_per_atom=1e6,
            max_force=math.inf,
        ),
        answer("c003", converged=False, failure="crashed", energy_per_atom=None, e_form_per_atom=None),
    ]
    assert store.add_evaluations(answers) == 3
    assert store.add_evaluations(answers) == 0
    assert store.failures_of_round(1) == {"crashed": 1, "timeout": 1}
    stored = {found.candidate_id: found for found in store.evaluations_of_round(1)}
    assert stored["c1"].forces == [[0.1, 0.0, -0.2]]
    with pytest.raises(InvalidInput, match="converged, with forces that are not finite numbers"):
        answer("c1", forces=[[0.1, 0.0, math.nan]])
    assert (stored["c1"].crystal_id, stored["c1"].novel, stored["c1"].n_steps) == (discovered.crystal.id, True, 12)
    assert stored["c1"].method == CHGNET
    assert stored["c02"].energy_per_atom is None
    assert stored["c02"].e_form_per_atom is None
    assert stored["c02"].message == "gaveup"
    assert store.predictions_of_round(1) == sorted(predictions, key=lambda p: p.candidate_id)
    assert store.candidates_of_round(1) == sorted(candidates, key=lambda c: c.id)
    assert store.candidates(["c02", "zz"]) == {"c02": candidates[1]}


def test_answers_are_stored_as_they_come_and_assessed_later(store: Store) -> None:
    store.start_round({}, 1)
    store.add_candidates([candidate("c1"), candidate("c02", symbols=("Li", "F"))])
    relaxed = seed(5.1, ("K", "Cl"), origin="discovered", round=1, candidate_id="c1")
    broken = Crystal(np.eye(3) * math.nan, np.array([3]), np.zeros((1, 3)))
    store.add_evaluations(
        [
            answer("c1", crystal=relaxed.crystal),
            answer("c02", converged=False, failure="implausible", crystal=broken, e_form_per_atom=None),
        ]
    )
    failed, converged = store.evaluations_of_round(1)
    assert (converged.crystal, converged.crystal_id, converged.novel) == (relaxed.crystal, None, None)
    assert failed.crystal is None
    with pytest.raises(InvalidInput, match="finite numbers"):
        answer("c1", crystal=broken)
    found = Assessment(
        candidate_id="c1", method=CHGNET.label, crystal_id=relaxed.crystal.id, novel=True, e_above_hull_before=-0.25
    )
    with pytest.raises(InvalidInput, match="refuses"):
        store.assess_evaluations([found])  # the crystal is not there yet
    store.add_crystals([relaxed])
    assert store.assess_evaluations([found]) == 1
    assert store.assess_evaluations([]) == 0
    assessed = store.evaluations_of_round(1)[1]
    assert (assessed.crystal_id, assessed.novel, assessed.e_above_hull_before) == (relaxed.crystal.id, True, -0.25)
    with pytest.raises(InvalidInput, match="e_above_hull_before is nan"):
        Assessment(candidate_id="c1", method="m", crystal_id="x", novel=True, e_above_hull_before=math.nan)


def test_what_was_known_before_a_round(store: Store) -> None:
    store.add_crystals([seed(4.0)])
    for number, symbols in ((1, ("K", "Cl")), (2, ("Li", "F"))):
        store.start_round({}, 1)
        tried = [candidate(f"c{number}", number, symbols), candidate(f"c0{number}", number, (*symbols, "O"))]
        others = [candidate(f"f{number}{i}", number, (*symbols, "S")) for i in range(MAX_FAILED)]
        once = candidate(f"o{number}", number, (*symbols, "N"))
        store.add_candidates([*tried, *others, once])
        failed = [tried[0], once, *others[: MAX_FAILED if number == 1 else MAX_FAILED - 1]]
        store.add_evaluations([answer(c.id, number, converged=False, failure="timeout") for c in failed])
        store.add_evaluations([answer(tried[1].id, number)])
        if number == 1:
            assert candidate("x", 1, ("K", "Cl", "O")).crystal.reduced_formula not in store.known_formulas(CHGNET.label)
        found = seed(6.0, (*symbols, "O"), origin="discovered", round=number, candidate_id=tried[1].id)
        store.add_crystals([seed(5.0, symbols, origin="discovered", round=number, candidate_id=f"c{number}"), found])
        assessed = Assessment(
            candidate_id=tried[1].id, method=CHGNET.label, crystal_id=found.crystal.id, novel=True, e_above_hull_before=0.0
        )
        assert store.assess_evaluations([assessed]) == 1
        store.finish_round(number, {})
    assert store.candidate_ids_of_round(2) == ["c02", "c2", *(f"f2{i}" for i in range(MAX_FAILED)), "o2"]
    assert store.known_formulas(CHGNET.label, before_round=1) == {"NaCl"}
    assert store.known_formulas(CHGNET.label, before_round=2) == {
        "NaCl",
        "KCl",
        candidate("x", 1, ("K", "Cl", "O")).crystal.reduced_formula,
        candidate("x", 1, ("K", "Cl", "S")).crystal.reduced_formula,
    }, "not what failed once"
    later = store.known_formulas(CHGNET.label) - store.known_formulas(CHGNET.label, before_round=2)
    assert later == {"LiF", candidate("x", 1, ("Li", "F", "O")).crystal.reduced_formula}
    assert store.known_formulas(EMT.label) == frozenset()
    assert [len(store.hull_entries(CHGNET.label, before_round=number)) for number in (1, 2, 3)] == [1, 3, 5]


def test_versions_stay_with_their_rows_while_the_label_is_one(store: Store) -> None:
    newer = Method(code="chgnet", functional="0.3.0", versions={"chgnet": "0.5.0"})
    assert newer.label == CHGNET.label
    store.start_round({}, 1)
    store.add_candidates([candidate("c1"), candidate("c02")])
    store.add_evaluations([answer("c1")])
    store.add_evaluations([answer("c02", method=newer)])
    assert [found.method.versions["chgnet"] for found in store.evaluations_of_round(1)] == ["0.5.0", "0.4.2"]
    store.add_crystals([seed(4.0), seed(4.1, method=newer)])
    assert [found.row["versions"]["chgnet"] for found in store.crystals_of(CHGNET.label)] == ["0.4.2", "0.5.0"]


def test_training_rows_carry_the_unrelaxed_crystal(store: Store) -> None:
    store.start_round({}, 1)
    proposed = candidate("c1")
    store.add_candidates([proposed])
    store.add_crystals([seed(4.0, energy_per_atom=-3.0), seed(5.2, ("K", "Cl"), origin="discovered", round=1, candidate_id="c1")])
    seeds, found = store.training_rows(CHGNET.label)
    assert seeds.unrelaxed is None
    assert seeds.energy_per_atom == -3.0
    assert found.unrelaxed == proposed.crystal
    assert found.crystal == crystal(5.2, ["K", "Cl"])


def test_lineage_goes_back_to_the_seed(store: Store) -> None:
    start = seed(4.0)
    store.add_crystals([start])
    store.add_model(model("m1"))
    parent, chain = start.crystal.id, [start.crystal.id]
    for number, edge in ((1, 5.0), (2, 5.5)):
        store.start_round({}, number)
        store.add_candidates([candidate(f"c{number}", number, parent_id=parent)])
        store.add_predictions(
            [PredictionRecord(candidate_id=f"c{number}", model_id="m1", e_form_per_atom=-1, spread=0, volume_scale=1)]
        )
        child = seed(edge, ("K", "Cl"), origin="discovered", round=number, candidate_id=f"c{number}")
        store.add_crystals([child, seed(edge, ("K", "Cl"), method=EMT)])
        store.add_evaluations([answer(f"c{number}", number, crystal_id=child.crystal.id)])
        store.finish_round(number, {})
        parent = child.crystal.id
        chain.append(parent)
    found = store.lineage(parent, CHGNET.label)
    assert [ancestor.crystal.id for ancestor in found] == chain[::-1]
    assert {ancestor.crystal.row["method"] for ancestor in found} == {CHGNET.label}
    assert [ancestor.candidate and ancestor.candidate.id for ancestor in found] == ["c2", "c1", None]
    assert [len(ancestor.predictions) for ancestor in found] == [1, 1, 0]
    assert found[0].evaluations[0].crystal_id == parent


def test_lineage_ends_where_the_parent_is_missing_or_comes_again(store: Store) -> None:
    store.start_round({}, 1)
    loop = seed(5.0, ("K", "Cl"), origin="discovered", round=1, candidate_id="c1")
    store.add_candidates([candidate("c1", parent_id=loop.crystal.id), candidate("c02", parent_id="gone")])
    orphan = seed(5.1, ("K", "Cl"), origin="discovered", round=1, candidate_id="c02")
    store.add_crystals([loop, orphan])
    assert len(store.lineage(loop.crystal.id)) == 1
    assert len(store.lineage(orphan.crystal.id)) == 1


def test_one_model_a_kind_is_in_use(store: Store) -> None:
    assert store.current_model("structural") is None
    assert store.add_model(model("m1")) is True
    assert store.add_model(model("m1")) is False
    store.add_model(model("m2", parent_id="m1", metrics={"mae": 0.1}))
    store.add_model(model("f1", kind="compositional"))
    store.promote_model("m1")
    store.promote_model("f1")
    assert store.promote_model("m2").metrics == {"mae": 0.1}
    assert [(m.id, m.status) for m in store.model_history("structural")] == [("m1", "retired"), ("m2", "promoted")]
    current = store.current_model("compositional")
    assert current is not None
    assert current.id == "f1"
    with pytest.raises(InvalidInput, match="no model 'm9'"):
        store.promote_model("m9")
    with pytest.raises(InvalidInput, match="refuses"), store.write() as connection:
        connection.execute(text("UPDATE models SET status = 'promoted'"))
    store.retire_model("m2")
    assert store.current_model("structural") is None


def test_models_are_taken_back_in_the_order_of_their_use(store: Store) -> None:
    for name in ("m1", "m2", "m3"):
        store.add_model(model(name))
    for name in ("m1", "m2", "m1", "m3", "m3"):
        store.promote_model(name)
    since = {m.id: m.promoted_at for m in store.model_history()}
    assert since["m2"] < since["m1"] < since["m3"]
    store.retire_model("m3")
    with pytest.raises(InvalidInput, match="m1 was not in use before m3, or another has been put in use meanwhile"):
        store.take_back_model("m3", "m1")
    store.promote_model("m3")
    assert store.take_back_model("m3", "m1").status == "promoted"
    assert {m.id: (m.status, m.promoted_at) for m in store.model_history()} == {
        "m1": ("promoted", since["m1"]),
        "m2": ("retired", since["m2"]),
        "m3": ("retired", None),
    }
    with pytest.raises(InvalidInput, match="m3 was not in use before m1"):
        store.take_back_model("m1", "m3")


def test_rounds_follow_one_another(store: Store) -> None:
    assert store.open_round() is None
    assert store.start_round({"budget": 5}, seed=2**40).number == 1
    with pytest.raises(RoundBusy, match="round 1 is unfinished"):
        store.start_round({}, 1)
    opened = store.open_round()
    assert opened is not None
    assert (opened.seed, opened.settings, opened.summary) == (2**40, {"budget": 5}, None)
    finished = store.finish_round(1, {"hit_rate": 0.5})
    assert finished.finished_at is not None
    assert finished.finished_at >= finished.started_at
    assert store.finish_round(1, {"hit_rate": 0.9}) == finished
    assert store.start_round({}, 2).number == 2
    assert store.finish_round(2, {}, failed=True).state == "failed"
    assert [found.state for found in store.rounds()] == ["finished", "failed"]
    with pytest.raises(InvalidInput, match="no round 7"):
        store.finish_round(7, {})


def test_rows_without_what_they_refer_to_are_refused(store: Store) -> None:
    with pytest.raises(InvalidInput, match="the database refuses the row"):
        store.add_candidates([candidate("c1", number=9)])
    store.start_round({}, 1)
    with pytest.raises(InvalidInput, match="the database refuses the row"):
        store.add_predictions([PredictionRecord(candidate_id="no", model_id="m", e_form_per_atom=0, spread=0, volume_scale=1)])
    store.add_candidates([candidate("c1")])
    with pytest.raises(InvalidInput, match="the database refuses the row"):
        store.add_evaluations([answer("c1", crystal_id="unknown")])
    assert store.counts()["evaluations"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e6, -1e6])
@pytest.mark.parametrize(
    "name", ["e_form_per_atom", "energy_per_atom", "correction_per_atom", "e_above_hull", "decomposition_energy"]
)
def test_records_refuse_what_cannot_be_true(name: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=rf"{name} is {value}".replace("+", r"\+")):
        seed(**{name: value})


def test_records_refuse_contradictions() -> None:
    with pytest.raises(InvalidInput, match="a failure has a reason"):
        EvaluationRecord(candidate_id="c", method=CHGNET, round=1, converged=False)
    with pytest.raises(InvalidInput, match="without energy_per_atom or e_form_per_atom"):
        EvaluationRecord(candidate_id="c", method=CHGNET, round=1, converged=True, energy_per_atom=-1.0)
    with pytest.raises(InvalidInput, match="e_form_per_atom is nan"):
        answer("c", e_form_per_atom=math.nan)
    with pytest.raises(InvalidInput, match=r"spread is -0\.1"):
        PredictionRecord(candidate_id="c", model_id="m", e_form_per_atom=0.0, spread=-0.1, volume_scale=1.0)
    with pytest.raises(InvalidInput, match="origin 'guess'"):
        CrystalRecord(crystal=crystal(4, ["Na"]), method=CHGNET, e_form_per_atom=0, fingerprint="f", origin="guess")
    with pytest.raises(InvalidInput, match=r"e_above_hull is -0\.01"):
        HullColumns(id="a", e_above_hull=-0.01, decomposition_energy=0, decomposes_to=[], n_competing=0)


IMPOSSIBLE: list[tuple[str, Any]] = [
    *[("e_form_per_atom", value) for value in (math.nan, math.inf, -math.inf, 1e6, -6.5, None)],
    *[("energy_per_atom", value) for value in (math.inf, -math.inf, 1e6)],
    *[("e_above_hull", value) for value in (math.inf, -math.inf, -1e-3, 1e6)],
    *[("decomposition_energy", value) for value in (math.inf, -math.inf, 1e6)],
    ("correction_per_atom", math.nan),
    ("volume_per_atom", 0.0),
    ("space_group_number", 231),
    ("origin", "guess"),
    ("n_atoms", 0),
]


def test_the_tables_refuse_what_gets_past_the_records(store: Store) -> None:
    store.add_crystals([seed(4.0, e_above_hull=0.0, decomposition_energy=0.0, energy_per_atom=-1.0)])
    before = store.crystal(seed(4.0).crystal.id).row
    for column, value in IMPOSSIBLE:
        with pytest.raises(InvalidInput, match="refuses"), store.write() as connection:
            connection.execute(text(f"UPDATE crystals SET {column} = :value"), {"value": value})
    assert store.crystal(seed(4.0).crystal.id).row == before


def test_nan_never_reaches_a_column_that_may_be_unknown(store: Store) -> None:
    store.add_crystals([seed(4.0, e_above_hull=0.0)])
    statement = text("UPDATE crystals SET e_above_hull = :value")
    if store.engine.dialect.name == "sqlite":  # SQLite has no NaN: it becomes NULL, an unknown distance
        with store.write() as connection:
            connection.execute(statement, {"value": math.nan})
        assert store.crystal(seed(4.0).crystal.id).row["e_above_hull"] is None
    else:
        with pytest.raises(InvalidInput, match="refuses"), store.write() as connection:
            connection.execute(statement, {"value": math.nan})


def test_a_failed_write_leaves_nothing_behind(store: Store) -> None:
    with pytest.raises(InvalidInput, match="refuses"):
        store.add_crystals([seed(4.0), seed(4.1, origin="discovered", candidate_id="unknown")])
    assert store.counts()["crystals"] == 0
    assert store.counts()["crystal_elements"] == 0


def test_a_database_opened_for_reading_is_not_written(store: Store, url: str) -> None:
    store.add_crystals([seed(4.0)])
    with Store.open(url, read_only=True) as reader:
        assert reader.counts()["crystals"] == 1
        with pytest.raises(DatabaseUnavailable, match="for reading only"):
            reader.add_crystals([seed(4.1)])
        with pytest.raises(DatabaseUnavailable, match="read"), reader.read() as connection:
            connection.execute(text("DELETE FROM crystals"))
        store.add_crystals([seed(4.2)])
        assert reader.counts()["crystals"] == 2


def test_a_second_attempt_takes_the_place_of_the_first(store: Store) -> None:
    store.start_round({}, 1)
    store.add_candidates([candidate("c1")])
    store.add_evaluations([answer("c1", converged=False, failure="timeout", message="slow", cost_seconds=900.0)])
    second = answer("c1", converged=False, failure="crashed", cost_seconds=1500.0, attempts=2)
    assert store.repeat_evaluation(second)
    assert not store.repeat_evaluation(second), "the first is gone"
    (kept,) = store.evaluations_of_round(1)
    assert (kept.failure, kept.cost_seconds, kept.attempts) == ("crashed", 1500.0, 2)
    assert store.failures_of_round(1) == {"crashed": 1}


def test_formulas_are_told_with_the_methods_that_knew_them(store: Store) -> None:
    store.add_crystals([seed(4.0), seed(4.0, method=EMT), seed(4.2, ("K", "Cl"))])
    store.start_round({}, 1)
    store.add_candidates([candidate("c1", symbols=("Li", "F"))])
    store.add_crystals([seed(5.0, ("Li", "F"), origin="discovered", round=1, candidate_id="c1")])
    found = store.methods_of_formulas(["NaCl", "KCl", "LiF", "CsI"], before_round=1)
    assert found == {"NaCl": sorted([CHGNET.label, EMT.label]), "KCl": [CHGNET.label]}
    assert "LiF" in store.methods_of_formulas(["LiF"], before_round=2)
    assert (store.count_crystals(CHGNET.label, before_round=1), store.count_crystals(CHGNET.label, before_round=2)) == (2, 3)


def test_seeds_are_given_once_a_file(store: Store) -> None:
    store.add_crystals([seed(4.0)])
    assert not store.is_seeded(CHGNET.label, "a" * 64)
    store.note_seeding(CHGNET.label, "a" * 64)
    store.note_seeding(CHGNET.label, "a" * 64)
    assert store.is_seeded(CHGNET.label, "a" * 64)
    assert not store.is_seeded(CHGNET.label, "b" * 64)
