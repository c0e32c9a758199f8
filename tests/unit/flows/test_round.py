"""The round as plain Python, in a small world under EMT."""

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emt_world import build_world, copy_world, known_crystals, round_settings, settings_in, tables, write_folder

from flows import filtering, rounds
from flows.filtering import looked_again, looked_best
from flows.importing import import_crystals
from flows.settings import RoundSettings
from flows.stages import STAGES, begin_round, run_round, run_shard
from flows.workspace import open_workspace
from gnome.database.query import query
from gnome.database.records import RoundRecord
from gnome.errors import EvaluatorUnavailable, InvalidInput, RoundBusy
from gnome.models.calibration import ErrorCalibration
from gnome.stability.hull import ConvexHull
from pipelines.cascade import FIRST_LOOK, SECOND_LOOK
from pipelines.screening import ScreeningSettings, known_errors
from pipelines.standing import FORMULA_THRESHOLD

pytestmark = pytest.mark.usefixtures("own_folder")


def rows_of(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / "gnome.db") as connection:
        rows = connection.execute(sql).fetchall()
    connection.close()
    return rows


def play(folder: Path, **changes: Any) -> RoundRecord:
    with open_workspace(settings_in(folder)) as workspace:
        return run_round(workspace, round_settings(**changes))


def test_the_summary_counts_what_the_tables_hold(after_round: Path) -> None:
    with open_workspace(settings_in(after_round)) as workspace:
        (record,) = workspace.store.rounds()
        counts = workspace.store.counts()
        evaluations = workspace.store.evaluations_of_round(1)
    assert record.state == "finished"
    assert record.summary is not None
    assert record.summary["n_candidates"] == counts["candidates"] == 60
    assert record.summary["n_screened"] == counts["predictions"]
    assert 20 <= counts["predictions"] < 60, "structures of 20 compositions"
    assert record.summary["n_evaluated"] == counts["evaluations"] == len(evaluations) == 6
    assert record.summary["n_converged"] + sum(record.summary["failures"].values()) == 6
    assert record.summary["n_novel"] == counts["crystals"] - len(known_crystals()) > 0
    assert set(record.summary["seconds"]) == set(STAGES)
    assert rows_of(after_round, "SELECT DISTINCT state FROM ledger") == [("done",)]


def test_the_hit_rate_is_what_its_definition_says(after_round: Path) -> None:
    """Recomputed from the tables alone: converged, new, on the hull as it is, and with a compound that competed before the round."""
    with open_workspace(settings_in(after_round)) as workspace:
        before = workspace.store.hull_entries(workspace.evaluator.method.label, before_round=1)
        assert len(before) == len(known_crystals())
        hull = ConvexHull(workspace.evaluator.method.label, before)
        evaluations = workspace.store.evaluations_of_round(1)
        new = {row["id"]: row for row in query(workspace.store, "_gnome_round = 1", with_crystals=True)}
        competing = {one.candidate_id: one.n_competing for one in workspace.store.predictions_of_round(1)}
        summary = workspace.store.round(1).summary
    hits = set()
    for record in evaluations:
        if record.converged and record.crystal is not None and record.e_form_per_atom is not None:
            distance = record.e_form_per_atom - hull.energy(record.crystal.composition)
            assert record.e_above_hull_before == pytest.approx(distance, abs=1e-12)
            row = new.get(record.crystal.id)
            if row is not None and row["e_above_hull"] <= 1e-3 and competing[record.candidate_id]:
                hits.add(row["reduced_formula"])
    assert summary is not None
    assert hits
    assert summary["n_hits"] == len(hits)
    assert summary["hit_rate"] == len(hits) / len(evaluations)


def test_hull_columns_are_those_of_a_fresh_hull(after_round: Path) -> None:
    with open_workspace(settings_in(after_round)) as workspace:
        entries = workspace.store.hull_entries(workspace.evaluator.method.label)
        hull = ConvexHull(workspace.evaluator.method.label, entries)
        rows = query(workspace.store, "", with_crystals=True)
    assert len(rows) == len(entries) == 24
    compositions = [row["crystal"].composition for row in rows]
    e_forms = [row["e_form_per_atom"] for row in rows]
    np.testing.assert_allclose([row["e_above_hull"] for row in rows], hull.e_above_hulls(compositions, e_forms), atol=1e-12)
    np.testing.assert_allclose(
        [row["decomposition_energy"] for row in rows], hull.decomposition_energies(compositions, e_forms), atol=1e-12
    )


def test_a_discovery_is_traced_down_to_a_crystal_that_was_imported(after_round: Path) -> None:
    with open_workspace(settings_in(after_round)) as workspace:
        discovered = query(workspace.store, "_gnome_round = 1")
        assert discovered
        for row in discovered:
            chain = workspace.store.lineage(row["id"])
            assert [step.crystal.row["origin"] for step in chain] == ["discovered", "imported"]
            assert chain[0].candidate is not None
            assert chain[0].candidate.parent_id == chain[1].crystal.id
            assert chain[0].predictions
            assert chain[0].evaluations[0].crystal_id == row["id"]
            assert "known" in chain[1].crystal.row["source"]


def test_the_same_seed_gives_the_same_tables_and_another_does_not(emt_world: Path, after_round: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path / "same")
    play(tmp_path / "same")
    assert tables(tmp_path / "same") == tables(after_round)
    copy_world(emt_world, tmp_path / "other")
    play(tmp_path / "other", seed=1)
    ids = {name: {row["id"] for row in tables(folder)["candidates"]} for name, folder in
           (("same", tmp_path / "same"), ("other", tmp_path / "other"))}  # fmt: skip
    assert ids["same"] != ids["other"]


def test_a_round_on_postgresql_finds_what_it_finds_on_sqlite(after_round: Path, postgresql_url: str, tmp_path: Path) -> None:
    copy_world(after_round, tmp_path)
    shared = settings_in(tmp_path)
    settings = shared.model_copy(update={"database_url": postgresql_url, "folder": shared.data_folder})
    source = write_folder(tmp_path / "known", known_crystals())
    with open_workspace(shared) as workspace:
        expected, found_on_sqlite = workspace.store.round(1), query(workspace.store, "")
    with open_workspace(settings) as workspace:
        import_crystals(workspace, source)
        record = run_round(workspace, round_settings())
        found = query(workspace.store, "")
    assert record.summary is not None
    assert expected.summary is not None
    dropped = {"seconds", "cost_seconds"}
    assert {k: v for k, v in record.summary.items() if k not in dropped} == {
        k: v for k, v in expected.summary.items() if k not in dropped
    }
    assert [(row["id"], row["e_above_hull"]) for row in found] == [(row["id"], row["e_above_hull"]) for row in found_on_sqlite]


def test_the_next_round_proposes_no_formula_already_evaluated(after_round: Path, tmp_path: Path) -> None:
    copy_world(after_round, tmp_path)
    record = play(tmp_path)
    assert (record.number, record.state) == (2, "finished")
    first = {formula for (formula,) in rows_of(
        tmp_path, "SELECT c.reduced_formula FROM evaluations e JOIN candidates c ON c.id = e.candidate_id WHERE e.round = 1 AND e.converged"
    )}  # fmt: skip
    second = {formula for (formula,) in rows_of(tmp_path, "SELECT reduced_formula FROM candidates WHERE round = 2")}
    assert second
    assert not first & second
    known = {crystal.reduced_formula for crystal in known_crystals().values()}
    assert not known & second
    with open_workspace(settings_in(tmp_path)) as workspace:
        assert len(workspace.store.hull_entries(workspace.evaluator.method.label)) > 24


def test_elements_bound_every_candidate(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    record = play(tmp_path, elements=("Cu", "Au", "Ni"))
    formulas = {formula for (formula,) in rows_of(tmp_path, "SELECT reduced_formula FROM candidates")}
    assert formulas
    for formula in formulas:
        assert not any(symbol in formula for symbol in ("Al", "Pd", "Ag", "Pt")), formula
    assert record.summary is not None
    assert record.summary["n_evaluated"] > 0


def test_a_round_without_a_candidate_ends_with_empty_tables(emt_world: Path, tmp_path: Path) -> None:
    """One element has no compounds: nothing is proposed, nothing evaluated, and the next round begins as usual."""
    copy_world(emt_world, tmp_path)
    record = play(tmp_path, elements=("Ag",))
    assert record.summary is not None
    assert (record.summary["n_candidates"], record.summary["n_evaluated"], record.summary["n_hits"]) == (0, 0, 0)
    assert record.summary["hit_rate"] is None
    assert play(tmp_path, n_candidates=10, n_screened=2, budget=1).number == 2


def test_a_round_in_which_every_candidate_fails_the_filter_evaluates_none(
    emt_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.screening import Refusal, Screening

    def refuse_all(candidates: Any, *_: Any) -> Screening:
        refusals = tuple(Refusal(candidate_id=c.id, reason="overlap", message="too close") for c in candidates)
        return Screening(predictions=(), refusals=refusals)

    monkeypatch.setattr("flows.filtering.screen", refuse_all)
    copy_world(emt_world, tmp_path)
    record = play(tmp_path)
    assert record.summary is not None
    assert (record.summary["n_candidates"], record.summary["n_screened"], record.summary["n_evaluated"]) == (60, 0, 0)
    with open_workspace(settings_in(tmp_path)) as workspace:
        assert workspace.ledger.result(1, "look")["refused"] == {"overlap": 60}


@pytest.mark.parametrize("again", [True, False])
def test_looks_narrow_down_what_gets_the_full_filter(emt_world: Path, tmp_path: Path, again: bool) -> None:
    copy_world(emt_world, tmp_path)
    assert play(tmp_path, n_looked_again=30, second_look=again).number == 1
    with open_workspace(settings_in(tmp_path)) as workspace:
        seen = {
            stage: [entry for shard in workspace.ledger.shards(1, stage) for entry in (shard.result or {})["ranked"]]
            for stage in ("look", "look_again")
        }
        screened = {prediction.candidate_id for prediction in workspace.store.predictions_of_round(1)}
        assert screened == set(looked_best(workspace, 1))
        if again:
            assert {entry[1] for entry in seen["look_again"]} == set(looked_again(workspace, 1))
    assert len(seen["look"]) == 60
    assert bool(seen["look_again"]) == again
    assert len(seen["look_again"]) < 60
    last = {
        identifier: (doubtful, energy, formula)
        for energy, identifier, doubtful, formula in seen["look_again" if again else "look"]
    }
    worst = max(last[identifier][:2] for identifier in screened)
    missed = {found[2] for identifier, found in last.items() if identifier not in screened and found[:2] < worst}
    assert missed <= {last[identifier][2] for identifier in screened}, (
        "only of compositions that are there with a better structure"
    )


@pytest.mark.parametrize("left", [0, 1])
def test_a_round_that_began_with_an_older_program_ends_as_it_began(emt_world: Path, tmp_path: Path, left: int) -> None:
    """Its settings know of one look and the lowest energy alone, and its look kept no formulas, in all shards or some."""
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        settings = round_settings(n_screened=10, n_looked_again=50)
        number = begin_round(workspace, settings).number
        for stage in ("propose", "calibrate", "look"):
            run_shard(workspace, number, stage, 0)
        ranked = (workspace.ledger.result(number, "look") or {})["ranked"]
    with sqlite3.connect(tmp_path / "gnome.db") as connection:
        (stored,) = connection.execute("SELECT settings FROM rounds").fetchone()
        older = {
            name: kept
            for name, kept in json.loads(stored).items()
            if name not in {"second_look", "over_volumes", "n_looked_again"}
        }
        connection.execute("UPDATE rounds SET settings = ?", [json.dumps(older)])
        pairs = [entry if i < left else entry[:2] for i, entry in enumerate(ranked)]
        changed = connection.execute(
            "UPDATE ledger SET result = json_set(result, '$.ranked', json(?)) WHERE stage = 'look'", [json.dumps(pairs)]
        )
        assert changed.rowcount == 1
    connection.close()
    assert play(tmp_path).state == "finished"
    with open_workspace(settings_in(tmp_path)) as workspace:
        assert rounds.round_settings(workspace, number).over_volumes == "lowest"
        assert not workspace.ledger.shards(number, "look_again")
        screened = {prediction.candidate_id for prediction in workspace.store.predictions_of_round(number)}
    assert screened == {entry[1] for entry in sorted(map(tuple, ranked))[:10]}


def test_numbers_are_in_proportion_to_the_budget_as_the_looks_keep() -> None:
    settings = RoundSettings(budget=7)
    assert (settings.n_looked_again, settings.n_screened) == (7 * FIRST_LOOK.kept, 7 * SECOND_LOOK.kept)
    assert RoundSettings(budget=7, n_screened=1500).n_looked_again == 1500
    assert RoundSettings.from_dict(settings.to_dict()) == settings


def test_a_second_look_at_fewer_than_the_full_filter_gets_is_refused() -> None:
    with pytest.raises(InvalidInput, match="n_looked_again is 9, expected at least n_screened, 10"):
        RoundSettings(n_looked_again=9, n_screened=10)


@pytest.mark.parametrize("known", [True, False])
def test_the_surest_are_evaluated_first_where_that_is_asked_for_and_known(
    emt_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    copy_world(emt_world, tmp_path)
    learnt = ErrorCalibration(floor=0.01, factor=5.0, power=1.0, degrees=3.0) if known else None
    fit_offset = filtering.fit_offset
    monkeypatch.setattr(
        "flows.filtering.fit_offset", lambda *given, **options: replace(fit_offset(*given, **options), calibration=learnt)
    )
    assert play(tmp_path, acquisition="stability").number == 1
    with open_workspace(settings_in(tmp_path)) as workspace:
        result = workspace.ledger.result(1, "select") or {}
        predictions = {one.candidate_id: one for one in workspace.store.predictions_of_round(1)}
    assert result["acquisition"] == ("stability" if known else "greedy")
    first = [predictions[identifier] for identifier in result["chosen"]]
    sure = [one for one in first if one.n_competing and (one.formula_check or 1.0) >= FORMULA_THRESHOLD]
    assert sure
    assert first[: len(sure)] == sure, "what is in doubt goes last"
    if learnt is not None:
        expected = [learnt.probability_below(np.array([-one.decomposition_energy]), np.array([one.spread]))[0] for one in sure]
        assert [one.p_stable for one in sure] == pytest.approx(expected)
        scores = [-one.p_stable for one in sure if one.p_stable is not None]
    else:
        assert {one.p_stable for one in sure} == {None}
        scores = [one.decomposition_energy for one in sure if one.decomposition_energy is not None]
    assert scores == sorted(scores)
    assert len(scores) == len(sure)


@pytest.mark.parametrize(("n_scales", "is_known"), [(1, True), (3, False)])
def test_errors_for_cells_as_they_are_say_nothing_of_other_volumes(n_scales: int, is_known: bool) -> None:
    learnt = ErrorCalibration(floor=0.01, factor=5.0, power=1.0, degrees=3.0)
    model: Any = SimpleNamespace(calibration=learnt)
    assert known_errors(model, None, ScreeningSettings(n_scales=n_scales)) == (learnt if is_known else None)


def test_an_unknown_acquisition_is_refused() -> None:
    with pytest.raises(InvalidInput, match="acquisition 'thompson', expected stability or greedy"):
        RoundSettings(acquisition="thompson")


def test_failures_count_against_the_hit_rate_and_reach_no_hull(
    emt_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dft_stub.evaluator import Evaluation, Failure

    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        method = workspace.evaluator.method

        def collect(ticket: str) -> Any:
            for identifier in workspace.evaluator.pending(ticket):
                yield Evaluation(id=identifier, method=method, converged=False, failure=Failure.TIMEOUT, message="too slow")
            workspace.evaluator._pending.clear()

        monkeypatch.setattr(workspace.evaluator, "collect", collect)
        record = run_round(workspace, round_settings())
        assert record.summary is not None
        assert record.summary["failures"] == {"timeout": 6}
        assert (record.summary["n_evaluated"], record.summary["hit_rate"]) == (6, 0.0)
        assert len(workspace.store.hull_entries(method.label)) == len(known_crystals())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"elements": ("Cu", "Xx")}, InvalidInput, "'Xx' is not an element symbol"),
        ({"elements": ("Fe",)}, InvalidInput, "Fe is not known to the ensemble, the hull and the evaluator together"),
    ],
)
def test_elements_that_cannot_be_used_start_no_round(
    emt_world: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    copy_world(emt_world, tmp_path)
    with pytest.raises(error, match=message):
        play(tmp_path, **changes)
    assert rows_of(tmp_path, "SELECT count(*) FROM rounds") == [(0,)]


@pytest.mark.parametrize("field", ["budget", "n_candidates", "n_screened", "n_formulas"])
def test_limits_below_one_are_refused(field: str) -> None:
    with pytest.raises(InvalidInput, match=f"{field} is 0, expected 1 or more"):
        RoundSettings(**{field: 0})


def test_an_unknown_generator_is_refused() -> None:
    with pytest.raises(InvalidInput, match="generator 'oracle', expected one of structural, compositional, both"):
        RoundSettings(generator="oracle")


def test_an_unknown_evaluator_is_refused(tmp_path: Path) -> None:
    with (
        open_workspace(settings_in(tmp_path), evaluator="vsap") as workspace,
        pytest.raises(InvalidInput, match="no evaluator is called 'vsap'; there are chgnet"),
    ):
        run_round(workspace, round_settings(evaluator="vsap"))


def test_a_database_without_a_crystal_of_the_method_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EvaluatorUnavailable, match=r"holds no crystal of method emt.*; import crystals with `gnome import`"):
        play(tmp_path)


def test_a_shard_that_another_process_works_on_is_left_to_it(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        number = begin_round(workspace, round_settings()).number
        workspace.ledger.claim(number, "propose", 0, owner="1@elsewhere#0.0")
        with pytest.raises(RoundBusy, match="shard 0 of propose in round 1 is being worked on by another process"):
            run_shard(workspace, number, "propose", 0)


def test_a_stage_that_fails_keeps_its_reason_and_can_be_run_again(
    emt_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        number = begin_round(workspace, round_settings()).number
        with monkeypatch.context() as patch:
            patch.setattr("flows.stages.propose_structural", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run_shard(workspace, number, "propose", 0)
        failed = workspace.ledger.find(number, "propose", 0)
        assert failed is not None
        assert (failed.state, failed.message) == ("failed", "ZeroDivisionError: division by zero")
        run_shard(workspace, number, "propose", 0)
        assert workspace.ledger.state(number, "propose") == "done"


def test_importing_the_same_crystals_again_adds_none(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    again = build_world(tmp_path)
    assert (again.n_imported, again.n_known, again.refused) == (0, len(known_crystals()), ())
