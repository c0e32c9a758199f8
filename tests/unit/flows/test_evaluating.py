"""Answers of an evaluator that is not what it was, or whose machine fails it."""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from emt_world import Listening, copy_world, round_settings, settings_in

from dft_stub.evaluator import Evaluation, Evaluator, Failure
from dft_stub.recorded import RecordedEvaluator, evaluation_to_dict
from flows.evaluating import answers, evaluate_crystals
from flows.rounds import chosen, round_model
from flows.stages import STAGES, abandon_round, begin_round, run_shard
from flows.workspace import Workspace, open_workspace
from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import GateSettings
from gnome.database.query import query
from gnome.database.records import ModelRecord
from gnome.errors import EvaluatorUnavailable, InvalidInput
from gnome.models.checkpoint import save_ensemble
from gnome.seeds import derived_seed
from gnome.stability.method import Method

pytestmark = pytest.mark.usefixtures("own_folder")


class Unreliable:
    """Answers as another evaluator does, but with a failure the first `n_failures` times that a crystal is asked for."""

    def __init__(self, evaluator: Evaluator, failure: Failure, n_failures: int) -> None:
        self.evaluator, self.failure, self.n_failures = evaluator, failure, n_failures
        self.method, self.elements, self.name = evaluator.method, evaluator.elements, evaluator.name
        self.gate, self.computes = evaluator.gate, evaluator.computes
        self.asked: dict[str, int] = {}

    def submit(self, crystals: Mapping[str, Crystal]) -> str:
        for identifier in crystals:
            self.asked[identifier] = self.asked.get(identifier, 0) + 1
        return self.evaluator.submit(crystals)

    def collect(self, ticket: str) -> Iterator[Evaluation]:
        for answer in self.evaluator.collect(ticket):
            if self.asked[answer.id] <= self.n_failures:
                nothing: dict[str, Any] = {"crystal": None, "energy_per_atom": None, "e_form_per_atom": None}
                yield replace(answer, converged=False, failure=self.failure, message="the machine failed", **nothing)
            else:
                yield answer

    def pending(self, ticket: str) -> frozenset[str]:
        return self.evaluator.pending(ticket)

    def close(self) -> None:
        self.evaluator.close()


def up_to_evaluate(workspace: Workspace) -> dict[str, Crystal]:
    """Run a round's stages before `evaluate`; returns the crystals that it chose."""
    number = begin_round(workspace, round_settings(budget=3)).number
    for stage in STAGES[: STAGES.index("evaluate")]:
        run_shard(workspace, number, stage, 0)
    return {record.id: record.crystal for record in workspace.store.candidates(chosen(workspace, number)).values()}


@pytest.mark.parametrize(
    ("failure", "n_failures", "asked", "failures"),
    [
        (Failure.CRASHED, 1, 2, {}),
        (Failure.TIMEOUT, 2, 2, {"timeout": 3}),
        (Failure.NOT_CONVERGED, 1, 1, {"not_converged": 3}),
    ],
    ids=["a crash that passes", "a timeout that stays", "no fault of the machine"],
)
def test_what_may_be_the_machines_fault_is_tried_once_more(
    emt_world: Path, tmp_path: Path, failure: Failure, n_failures: int, asked: int, failures: dict[str, int]
) -> None:
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        crystals = up_to_evaluate(workspace)
        unreliable = Unreliable(workspace.evaluator, failure, n_failures)
        vars(workspace)["evaluator"] = unreliable
        result = evaluate_crystals(workspace, 1, crystals)
        stored = workspace.store.evaluations_of_round(1)
    assert set(unreliable.asked.values()) == {asked}
    assert result["failures"] == failures
    assert len(stored) == len(crystals) == 3
    assert sum(record.converged for record in stored) == 3 - sum(failures.values())


@pytest.mark.parametrize("failure", [Failure.TIMEOUT, Failure.CRASHED, Failure.OUT_OF_MEMORY])
def test_a_failure_on_record_is_looked_up_and_paid_for_once(emt_world: Path, tmp_path: Path, failure: Failure) -> None:
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        crystals, method = up_to_evaluate(workspace), workspace.evaluator.method
        failed = {"method": method, "converged": False, "failure": failure, "message": "slow", "cost_seconds": 900.0}
        lines = [evaluation_to_dict(Evaluation(id=crystal.id, **failed)) for crystal in crystals.values()]
        (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        vars(workspace)["evaluator"] = RecordedEvaluator(tmp_path / "answers.jsonl", wait=True)
        for _ in range(2):  # nor is it when the stage is run again
            evaluate_crystals(workspace, 1, crystals)
            stored = workspace.store.evaluations_of_round(1)
            assert len(stored) == 3
            assert {(one.failure, one.attempts, one.cost_seconds) for one in stored} == {(failure, 1, 900.0)}


def test_an_answer_that_nobody_asked_for_is_one_line(emt_world: Path, tmp_path: Path) -> None:
    class Renaming(Unreliable):
        def collect(self, ticket: str) -> Iterator[Evaluation]:
            first, *_ = super().collect(ticket)
            yield first
            yield replace(first, id="stranger")

    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        crystals = up_to_evaluate(workspace)
        vars(workspace)["evaluator"] = Renaming(workspace.evaluator, Failure.CRASHED, 0)
        with pytest.raises(EvaluatorUnavailable, match="answers for 'stranger', which it was not asked for"):
            evaluate_crystals(workspace, 1, crystals)
        assert len(workspace.store.evaluations_of_round(1)) == 1


def test_the_gate_is_the_evaluators_own(emt_world: Path, tmp_path: Path) -> None:
    """Here it asks for cells larger than those of any answer; the usual one is not asked."""
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        crystals = up_to_evaluate(workspace)
        strict = Unreliable(workspace.evaluator, Failure.CRASHED, 0)
        strict.gate = GateSettings(min_volume_per_atom=50.0)
        assert {answer.failure for answer in answers(strict, crystals)} == {Failure.IMPLAUSIBLE}
        strict.gate = GateSettings()
        assert {answer.failure for answer in answers(strict, crystals)} == {None}


def test_an_evaluator_that_has_changed_does_not_go_on_with_a_round(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        up_to_evaluate(workspace)
        changed = Unreliable(workspace.evaluator, Failure.CRASHED, 0)
        changed.method = Method(code="emt", functional="newer")
        vars(workspace)["evaluator"] = changed
        with pytest.raises(EvaluatorUnavailable, match="use the versions it began with, or give it up"):
            run_shard(workspace, 1, "evaluate", 0)
        assert changed.asked == {}
        assert workspace.ledger.state(1, "evaluate") == "failed"


def test_a_round_keeps_the_ensemble_it_began_with(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        number = begin_round(workspace, round_settings()).number
        before = workspace.structural_model()
        path = tmp_path / "other.safetensors"
        card = save_ensemble(path, before.members[:2], {"method": before.method, "elements": sorted(before.elements)})
        other = ModelRecord(
            id=card["sha256"][:16], kind="structural", path=str(path), sha256=card["sha256"], card=card, metrics={}
        )
        workspace.store.add_model(other)
        workspace.store.promote_model(other.id)
        assert workspace.structural_model().model_id == other.id
        assert round_model(workspace, number).model_id == before.model_id
        for stage in STAGES[: STAGES.index("select")]:
            run_shard(workspace, number, stage, 0)
        assert {prediction.model_id for prediction in workspace.store.predictions_of_round(number)} == {before.model_id}


def test_what_an_abandoned_round_answered_is_assessed_and_kept(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        up_to_evaluate(workspace)
        run_shard(workspace, 1, "evaluate", 0)
        before = len(workspace.store.hull_entries(workspace.evaluator.method.label))
        record = abandon_round(workspace)
        after = len(workspace.store.hull_entries(workspace.evaluator.method.label))
        assert not workspace.store.has_unplaced(workspace.evaluator.method.label)
    assert record.state == "failed"
    assert record.summary is not None
    assert after - before == record.summary["n_novel"] == record.summary["n_kept"] > 0


@pytest.mark.parametrize(("breaks", "n_kept", "said"), [("assess", 0, "assessed to the end"), ("hits_of_round", 3, "summed up")])
def test_what_is_said_of_an_abandoned_round_is_what_was_kept(
    emt_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str, n_kept: int, said: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise InvalidInput("no")

    copy_world(emt_world, tmp_path)
    heard = Listening()
    with open_workspace(settings_in(tmp_path), listener=heard) as workspace:
        up_to_evaluate(workspace)
        run_shard(workspace, 1, "evaluate", 0)
        monkeypatch.setattr(f"flows.stages.{breaks}", broken)
        record = abandon_round(workspace)
        assert len(query(workspace.store, "_gnome_round = 1")) == n_kept
        known = workspace.store.known_formulas(workspace.evaluator.method.label)
        answered = {
            one.crystal.reduced_formula
            for one in workspace.store.evaluations_of_round(1)
            if one.converged and one.crystal is not None
        }
    assert (record.summary or {})["n_kept"] == n_kept
    assert heard.said[-1] == f"What round 1 answered could not be {said}: no"
    assert bool(answered & known) is bool(n_kept), "what is on no hull may be proposed again"


def test_crystals_that_were_never_placed_on_the_hull_are_placed_when_a_round_begins(emt_world: Path, tmp_path: Path) -> None:
    """What stored them may have been killed before it came to that."""
    copy_world(emt_world, tmp_path)
    with sqlite3.connect(tmp_path / "gnome.db") as connection:
        connection.execute("UPDATE crystals SET e_above_hull = NULL, decomposition_energy = NULL")
    connection.close()
    with open_workspace(settings_in(tmp_path)) as workspace:
        method = workspace.evaluator.method.label
        assert workspace.store.has_unplaced(method)
        begin_round(workspace, round_settings())
        assert not workspace.store.has_unplaced(method)


def test_seeds_and_rounds_side_by_side_share_no_stream() -> None:
    seeds = [derived_seed(seed, number) for seed in range(20) for number in range(20)]
    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derived_seed(2**62 - 1, 3) == derived_seed(2**62 - 1, 3)
