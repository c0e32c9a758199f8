"""Campaigns and retraining as plain Python, under EMT with a validation set of its own."""

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from emt_world import Listening, copy_world, length, round_settings, settings_in, tables

from flows import learning
from flows.assess import crystal_record
from flows.learning import FINE_TUNING, RAN_AWAY, new_answers, retrain
from flows.loop import campaign_of, latest_round, resume_campaign, run_campaign
from flows.progress import Counter, Silent
from flows.reports import campaign_rows
from flows.rounds import round_method
from flows.settings import CampaignSettings
from flows.stages import begin_round, run_shard
from flows.workspace import open_workspace
from gnome.crystals.convert import to_atoms
from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import split_bucket
from gnome.database.records import ModelRecord
from gnome.errors import InvalidInput
from gnome.models.checkpoint import load_ensemble

pytestmark = pytest.mark.usefixtures("own_folder")
TINY = round_settings(n_candidates=40, n_screened=10, budget=4, n_scales=1, smallest_scale=1.0, largest_scale=1.0)


@pytest.fixture
def quick(emt_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate on crystals labelled by EMT, which is far from PBE, and fine-tune on the few there are for three epochs in large steps."""
    monkeypatch.setattr(learning, "shipped_data", lambda: emt_data)
    use_training(monkeypatch, epochs=3, learning_rate=1e-3)


def use_training(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setattr("flows.stages.retrain", functools.partial(retrain, settings=replace(FINE_TUNING, **changes)))


def weights(folder: Path) -> list[Path]:
    return sorted((settings_in(folder).data_folder / "models").glob("structural-*.safetensors"))


@pytest.mark.usefixtures("quick")
def test_a_campaign_of_three_rounds_learns_once_it_should(emt_world: Path, tmp_path: Path) -> None:
    """Four answers a round and learning after six: after the second round, and not again after the third."""
    with open_workspace(copy_world(emt_world, tmp_path)) as workspace:
        rounds = run_campaign(workspace, TINY, CampaignSettings(rounds=3, retrain_after=6))
        assert [record.number for record in rounds] == [1, 2, 3]
        rows = campaign_rows(workspace.store)
        models = workspace.store.model_history("structural")
        shipped, learnt = models
        method = round_method(workspace, 3)
        third = workspace.store.round(3).settings["model"]
        offset = workspace.ledger.result(3, "calibrate")["offset"]
        predictions = workspace.store.predictions_of_round(3)
        left_to_learn = new_answers(workspace, method)
    assert [row["state"] for row in rows] == ["finished"] * 3
    assert [row["retrained"] is not None for row in rows] == [False, True, False]
    assert all(0 <= row["hit_rate"] <= 1 for row in rows)
    assert rows[1]["error_after"] <= rows[1]["error_before"]
    assert rows[1]["promoted"] is True
    assert (learnt.status, learnt.parent_id, learnt.round) == ("promoted", shipped.id, 2)
    assert shipped.status == "retired"
    assert third == learnt.id
    assert offset is None, "a model of the hull's own method needs no offset"
    assert {prediction.model_id for prediction in predictions} == {learnt.id}
    assert learnt.card["method"] == method
    assert learnt.card["learnt_up_to_round"] == 2
    assert left_to_learn == rows[2]["n_evaluated"]
    _, card = load_ensemble(*weights(tmp_path))
    assert card["sha256"] == learnt.sha256


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("learning_rate", "lowest"), [(0.05, 0.0), (1e4, RAN_AWAY)], ids=["worse", "ran away"])
def test_a_model_that_came_out_worse_is_not_used(
    after_round: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learning_rate: float, lowest: float
) -> None:
    use_training(monkeypatch, epochs=3, learning_rate=learning_rate)
    with open_workspace(copy_world(after_round, tmp_path)) as workspace:
        result = run_shard(workspace, 1, "retrain", 0)
        current = workspace.store.current_model("structural")
        worse = workspace.store.model_history("structural")[-1]
        (row,) = campaign_rows(workspace.store)
    assert result["error_after"] > result["error_before"]
    assert result["error_after"] >= lowest
    assert result["promoted"] is False
    assert current is not None
    assert current.id == result["parent_id"] != result["model_id"]
    assert (worse.id, worse.status) == (result["model_id"], "retired")
    assert row["promoted"] is False


class Interrupting(Silent):
    """Interrupts in the stage named, after `left` counts."""

    def __init__(self, name: str, left: int) -> None:
        self.name, self.left = name, left

    @contextmanager
    def stage(self, name: str, total: int, unit: str, **_: Any) -> Iterator[Counter]:
        def count(n: int = 1) -> None:
            self.left -= n if name == self.name else 0
            if self.left < 0:
                raise KeyboardInterrupt

        yield count


def learn(folder: Path, listener: Silent | None = None) -> dict[str, Any]:
    with open_workspace(settings_in(folder), listener=listener) as workspace:
        return run_shard(workspace, 1, "retrain", 0)


@pytest.mark.usefixtures("quick")
def test_retraining_that_was_interrupted_ends_with_the_weights_of_an_unbroken_one(after_round: Path, tmp_path: Path) -> None:
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    copy_world(after_round, unbroken)
    expected = learn(unbroken)
    copy_world(after_round, broken)
    with pytest.raises(KeyboardInterrupt):
        learn(broken, Interrupting("retraining", 7))
    assert weights(broken) == []
    found = learn(broken)
    assert found["model_id"] == expected["model_id"]
    ours, _ = load_ensemble(*weights(broken))
    theirs, _ = load_ensemble(*weights(unbroken))
    assert [path.suffix for path in sorted(weights(broken)[0].parent.iterdir())] == [".json", ".safetensors"], (
        "nothing else is left"
    )
    for one, other in zip(ours, theirs, strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    assert tables(broken) == tables(unbroken)


@pytest.mark.usefixtures("quick")
def test_an_interrupted_campaign_is_finished_with_its_own_settings(emt_world: Path, tmp_path: Path) -> None:
    limits = CampaignSettings(rounds=2, retrain_after=1000)
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    with open_workspace(copy_world(emt_world, unbroken)) as workspace:
        run_campaign(workspace, TINY, limits)
    listener = Interrupting("evaluating", 1)
    with open_workspace(copy_world(emt_world, broken), listener=listener) as workspace, pytest.raises(KeyboardInterrupt):
        run_campaign(workspace, TINY, limits)
    with open_workspace(settings_in(broken), resume=True) as workspace:
        assert campaign_of(latest_round(workspace)) == CampaignSettings(rounds=2, retrain_after=1000)
        done = resume_campaign(workspace)
        assert [record.number for record in done] == [1, 2]
        assert campaign_of(latest_round(workspace)).rounds == 1
        assert not resume_campaign(workspace), "nothing is left to do"
    assert tables(broken) == tables(unbroken)


def test_a_campaign_does_not_change_the_evaluator_of_an_interrupted_round(emt_world: Path, tmp_path: Path) -> None:
    with open_workspace(copy_world(emt_world, tmp_path)) as workspace:
        begin_round(workspace, TINY)
        with pytest.raises(InvalidInput, match="round 1 is unfinished and works with emt, the campaign would with chgnet"):
            run_campaign(workspace, replace(TINY, evaluator="chgnet"), CampaignSettings(rounds=2))


def test_nothing_to_resume_is_said(emt_world: Path, tmp_path: Path) -> None:
    with (
        open_workspace(copy_world(emt_world, tmp_path)) as workspace,
        pytest.raises(InvalidInput, match="has no round; start with `gnome campaign run`"),
    ):
        resume_campaign(workspace)


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"retrain_after": 0}])
def test_campaigns_of_nothing_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match="expected 1 or more"):
        CampaignSettings(**changes)


def test_with_too_few_crystals_to_judge_by_a_campaign_goes_on_without_learning(emt_world: Path, tmp_path: Path) -> None:
    """The shipped set holds energies of the default evaluator, so it cannot judge what was learnt from another."""
    heard = Listening()
    with open_workspace(copy_world(emt_world, tmp_path), listener=heard) as workspace:
        run_campaign(workspace, TINY, CampaignSettings(rounds=2, retrain_after=1))
        reasons = [workspace.ledger.result(number, "retrain")["skipped"] for number in (1, 2)]
        (model,) = workspace.store.model_history("structural")
        rows = campaign_rows(workspace.store)
        n = sum(learning.is_held_out(row) for row in workspace.store.training_rows(round_method(workspace, 1)))
    assert reasons[1].startswith(f"{n} crystals of ")
    assert "are held out to judge by what is learnt (those of the buckets 55 to 59), 30 of 10 are needed" in reasons[1]
    assert heard.said[-1] == f"Not retrained: {reasons[1]}"
    assert model.status == "promoted"
    assert [(row["state"], row["retrained"]) for row in rows] == [("finished", None)] * 2


METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")


def many_alloys() -> list[Crystal]:
    """Cells of up to four kinds of metal at two volumes, enough for some twenty formulas of the held-out buckets."""
    made, seen = [], set()
    for symbols in itertools.combinations_with_replacement(METALS, 4):
        a = length(*symbols)
        sites = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
        crystal = Crystal.from_symbols(np.eye(3) * a, list(symbols), sites)
        if crystal.reduced_formula not in seen and len(crystal.composition) > 1:
            seen.add(crystal.reduced_formula)
            made += [crystal.scaled(factor) for factor in (0.96, 1.0, 1.06, 1.12)]
    held_out = [crystal for crystal in made if split_bucket(crystal.reduced_formula) in range(55, 60)]
    return held_out + [crystal for crystal in made if crystal not in held_out][::6]


def test_under_an_evaluator_without_a_shipped_validation_set_its_own_crystals_judge(
    emt_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Energies of EMT, computed for cells as they are, in a database after one round."""
    use_training(monkeypatch, epochs=2, learning_rate=1e-3, batch_size=16)
    seen: list[Crystal] = []
    original = learning.training_examples

    def examples(rows: Any, elements: Any) -> Any:
        seen.extend(row.crystal for row in rows)
        return original(rows, elements)

    monkeypatch.setattr(learning, "training_examples", examples)
    with open_workspace(copy_world(emt_world, tmp_path)) as workspace:
        begin_round(workspace, TINY)
        workspace.store.finish_round(1, {})
        method = workspace.evaluator.method
        records = []
        for crystal in many_alloys():
            atoms = to_atoms(crystal)
            atoms.calc = EMT()
            energy = atoms.get_potential_energy() / len(atoms)
            e_form = workspace.evaluator.references.formation_energy_per_atom(crystal.composition, energy)
            records.append(crystal_record(crystal, method, e_form_per_atom=e_form, energy_per_atom=energy, origin="imported"))
        workspace.store.add_crystals(records)
        rows = list(workspace.store.training_rows(method.label))
        held_out = [row for row in rows if split_bucket(row.crystal.reduced_formula) in range(55, 60)]
        assert len(held_out) >= 30
        result = run_shard(workspace, 1, "retrain", 0)
        learnt = workspace.store.model(result["model_id"])
        current = workspace.store.current_model("structural")
    assert result["error_after"] < result["error_before"]
    assert result["promoted"] is True
    assert current is not None
    assert current.id == learnt.id
    assert learnt.metrics["n_validation"] == len(held_out)
    assert result["n_training"] == len(rows) - len(held_out)
    assert not {crystal.reduced_formula for crystal in seen} & {row.crystal.reduced_formula for row in held_out}
    assert learnt.card["method"] == method.label
    assert "buckets 55 to 59" in learnt.card["held_out"]
    assert learnt.card["calibrated_on"] == f"{len(held_out)} crystals of {method.label} in the database, of the buckets 55 to 59"
    assert learnt.card["calibration"] is not None, "candidates of the next round need their probabilities"


@pytest.mark.parametrize(
    ("asked", "card", "device", "expected"),
    [
        ("auto", {"training": {"precision": "fp8"}}, "cuda", "fp8"),
        ("auto", {"training": {"precision": "fp8"}}, "cpu", "fp32"),
        ("auto", {"precision": "bf16", "training": {"precision": "fp8"}}, "cuda", "bf16"),
        ("auto", {}, "cuda", "fp32"),
        ("bf16", {"precision": "fp8"}, "cpu", "bf16"),
    ],
)
def test_the_precision_of_learning(asked: str, card: dict[str, Any], device: str, expected: str) -> None:
    assert learning.retraining_precision(asked, card, torch.device(device)) == expected


@pytest.mark.usefixtures("quick")
def test_a_campaign_learns_in_the_precision_it_was_given(emt_world: Path, tmp_path: Path) -> None:
    with open_workspace(copy_world(emt_world, tmp_path)) as workspace:
        run_campaign(workspace, TINY, CampaignSettings(rounds=1, retrain_after=1, precision="bf16"))
        assert campaign_of(latest_round(workspace)).precision == "bf16"
        assert workspace.store.model_history("structural")[-1].card["precision"] == "bf16"
    with pytest.raises(InvalidInput, match="precision 'fp7', expected auto, fp32, bf16, fp8"):
        CampaignSettings(precision="fp7")


def test_formulas_of_the_validation_set_are_never_learnt(
    after_round: Path, emt_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    seen: list[str] = []
    original = learning.training_examples

    def examples(rows: Any, elements: Any) -> Any:
        seen.extend(row.crystal.reduced_formula for row in rows)
        return original(rows, elements)

    monkeypatch.setattr(learning, "training_examples", examples)
    with open_workspace(copy_world(after_round, tmp_path)) as workspace:
        held_out = learning.load_validation(workspace.store, round_method(workspace, 1)).formulas
        stored = {
            row.crystal.reduced_formula
            for row in workspace.store.training_rows(round_method(workspace, 1))
            if split_bucket(row.crystal.reduced_formula) not in range(55, 60)
        }
        run_shard(workspace, 1, "retrain", 0)
    assert held_out & stored, "the round found crystals of the validation set's formulas"
    assert set(seen) == stored - held_out


def test_training_examples_hold_relaxed_and_unrelaxed_crystals_under_the_relaxed_energy(after_round: Path) -> None:
    with open_workspace(settings_in(after_round)) as workspace:
        rows = list(workspace.store.training_rows(round_method(workspace, 1)))
    crystals, targets = learning.training_examples(rows, frozenset(range(1, 90)))
    discovered = [row for row in rows if row.unrelaxed is not None]
    assert len(discovered) == 6
    assert len(crystals) == len(targets) == len(rows) + len(discovered)
    for row in discovered:
        positions = [i for i, crystal in enumerate(crystals) if crystal in (row.crystal, row.unrelaxed)]
        assert {targets[i] for i in positions} == {row.e_form_per_atom}
    without_copper, _ = learning.training_examples(rows, frozenset(range(1, 90)) - {29})
    assert 0 < len(without_copper) < len(crystals)
    assert not any(29 in crystal.composition for crystal in without_copper)


def test_unknown_elements_count_as_one_electronvolt_off(
    after_round: Path, emt_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "shipped_data", lambda: emt_data)
    with open_workspace(settings_in(after_round)) as workspace:
        validation = learning.load_validation(workspace.store, round_method(workspace, 1))
        model = workspace.structural_model()

    class Fewer:
        model_id, method, elements = model.model_id, model.method, model.elements - {79}
        member_energies = staticmethod(model.member_energies)

    errors = learning.validation_error(Fewer(), validation)
    golden = [79 in crystal.composition for crystal in validation.crystals]
    assert any(golden)
    assert not all(golden)
    assert (errors[golden] == 1.0).all()
    assert (errors[[not one for one in golden]] != 1.0).all()


def test_a_newer_shipped_ensemble_takes_the_place_of_an_older_one(emt_world: Path, tmp_path: Path) -> None:
    """A database names the ensemble that an earlier version shipped under the same name."""
    with open_workspace(copy_world(emt_world, tmp_path)) as workspace:
        store = workspace.store
        old = ModelRecord(
            id="0" * 16, kind="compositional", path="shipped:compositional.safetensors", sha256="0" * 64, card={}, metrics={}
        )
        mine = replace(old, id="1" * 16, path="/nowhere/mine.safetensors", sha256="1" * 64)
        for record in (old, mine):
            store.add_model(record)
        store.promote_model(old.id)
        shipped = workspace.formula_model().model_id
        current = store.current_model("compositional")
        assert current is not None
        assert current.id == shipped != old.id
        assert store.model(old.id).status == "retired"
        store.promote_model(mine.id)
        workspace.register_shipped_models()
        current = store.current_model("compositional")
        assert current is not None
        assert current.id == mine.id, "one's own model stays in use"


def test_a_round_of_formulas_keeps_the_ensemble_that_it_began_with(emt_world: Path, tmp_path: Path) -> None:
    with open_workspace(copy_world(emt_world, tmp_path)) as workspace:
        began = begin_round(workspace, replace(TINY, generator="compositional"))
        in_use = workspace.store.current_model("compositional")
        assert in_use is not None
        assert workspace.store.round(began.number).settings["formula_model"] == in_use.id
        other = ModelRecord(id="1" * 16, kind="compositional", path="/nowhere.safetensors", sha256="1" * 64, card={}, metrics={})
        workspace.store.add_model(other)
        workspace.store.promote_model(other.id)
        assert workspace.formula_model(in_use.id).model_id == in_use.id
