"""Learning from a round: fine-tune the structural ensemble on everything the evaluator has answered, and promote it if it is not worse.

First form: all crystals of the method (relaxed seeds and discoveries, and the unrelaxed candidates these came from, under the relaxed
energy) are the training set, but for the formulas of the validation buckets, which are never learnt.  The shipped validation set decides;
under a method that it does not hold energies of, the method's own crystals of those buckets do, once there are enough.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
import torch

from flows.device import device_of
from flows.settings import AUTOMATIC, PRECISIONS
from flows.workspace import Workspace
from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import split_bucket
from gnome.crystals.shards import read_shard
from gnome.database.records import ModelRecord, TrainingRow
from gnome.database.store import Store
from gnome.errors import InvalidInput
from gnome.graphs.crystal_graph import PackedGraphs
from gnome.models.checkpoint import Network, save_ensemble
from gnome.models.datasets import VALIDATION_BUCKETS
from gnome.models.energy_model import EnergyModel
from gnome.models.ensemble import CrystalNetwork, StructuralEnsemble, calibrate_crystals
from gnome.models.linear import Precision
from gnome.models.metrics import bootstrap, mean_absolute_error
from gnome.models.recipes import EnsembleSettings, train_member
from gnome.models.training import EpochRecord, Labelled, TrainSettings
from gnome.quantities import Quantity
from gnome.seeds import derived_seed
from gnome.shipped import shipped_data
from gnome.stability.method import Method
from pipelines.cascade import AS_GUESSED
from pipelines.screening import fit_offset, predict_energies

FINE_TUNING = TrainSettings(epochs=4, batch_size=32, learning_rate=1e-4, volume_jitter=0.2, save_every=1)
HELD_OUT: Final = f"{VALIDATION_BUCKETS[0]} to {VALIDATION_BUCKETS[-1]}"

RAN_AWAY = 1000.0
"""eV/atom: the error of a prediction that is no number, as a network gives whose training ran away."""

MIN_HELD_OUT, MIN_FORMULAS_HELD_OUT = 30, 10
"""Crystals of the validation buckets, and different formulas among them, from which on they may judge a retraining."""

MAX_CALIBRATION = 500
"""Crystals that an offset is fitted on, at most."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """What a retraining did; errors are those of predictions at the volume as it was guessed on the validation set, eV/atom.

    `error_before` is that of the ensemble in use with its offset, when it was trained on another method.
    """

    model_id: str
    parent_id: str
    promoted: bool
    n_training: int
    error_before: float
    error_after: float

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class ValidationSet:
    """Crystals, unrelaxed where that is known, with the energies of their relaxed states under one method, and what they are in words."""

    crystals: list[Crystal]
    e_form_per_atom: np.ndarray[Any, np.dtype[np.float64]]
    source: str = "the shipped validation set"

    @property
    def formulas(self) -> frozenset[str]:
        """Reduced formulas that no training set may hold."""
        return frozenset(crystal.reduced_formula for crystal in self.crystals)


def load_validation(store: Store, method: str) -> ValidationSet:
    """Find what judges a retraining: the shipped validation set, or the method's own crystals of the validation buckets.

    Raises InvalidInput where those are too few to judge by.
    """
    label, shipped = _shipped_validation()
    if label == method:
        return shipped
    rows = [row for row in store.training_rows(method) if is_held_out(row)]
    n_formulas = len({row.crystal.reduced_formula for row in rows})
    if len(rows) < MIN_HELD_OUT or n_formulas < MIN_FORMULAS_HELD_OUT:
        raise InvalidInput(
            f"{len(rows)} crystals of {n_formulas} formulas under {method} are held out to judge by what is learnt (those of the buckets "
            f"{HELD_OUT}), {MIN_HELD_OUT} of {MIN_FORMULAS_HELD_OUT} are needed; until then rounds go on without learning"
        )
    return ValidationSet(
        [row.unrelaxed or row.crystal for row in rows],
        np.array([row.e_form_per_atom for row in rows]),
        f"{len(rows)} crystals of {method} in the database, of the buckets {HELD_OUT}",
    )


def is_held_out(row: TrainingRow) -> bool:
    """Whether a crystal's formula is of the buckets that judge, and that nothing learns from."""
    return split_bucket(row.crystal.reduced_formula) in VALIDATION_BUCKETS


def unrelaxed_examples(method: str, rows: Iterable[TrainingRow]) -> tuple[list[Crystal], list[float]]:
    """Return unrelaxed crystals, and the energies of their relaxed states, that an ensemble of another method cannot have learnt from.

    They are the validation set's; under other methods than its the latest candidates among the rows.
    """
    label, validation = _shipped_validation()
    if label == method:
        return validation.crystals, validation.e_form_per_atom.tolist()
    evaluated = [(row.unrelaxed, row.e_form_per_atom) for row in rows if row.unrelaxed is not None]
    evaluated = evaluated[-MAX_CALIBRATION:]
    return [crystal for crystal, _ in evaluated], [energy for _, energy in evaluated]


def _validation_file() -> Path:
    return shipped_data() / "validation.parquet"


def _shipped_validation() -> tuple[str, ValidationSet]:
    crystals, columns, metadata = read_shard(_validation_file())
    return Method.from_dict(metadata["method"]).label, ValidationSet(crystals, np.array(columns[Quantity.E_FORM_PER_ATOM]))


def new_answers(workspace: Workspace, method: str) -> int:
    """Count the converged evaluations that the ensemble in use has not learnt from."""
    current = workspace.structural_model()
    learnt = int(current.card.get("learnt_up_to_round", 0)) if current.method == method else 0
    return sum(
        record.converged
        for done in workspace.store.rounds()
        if done.number > learnt
        for record in workspace.store.evaluations_of_round(done.number)
        if record.method.label == method
    )


def retrain(
    workspace: Workspace,
    method: str,
    number: int,
    *,
    settings: TrainSettings = FINE_TUNING,
    seed: int = 0,
    precision: str = AUTOMATIC,
) -> Retraining:
    """Fine-tune the ensemble in use after round `number`; a run that was interrupted goes on where it stopped.

    `precision` as of `retraining_precision`.  Raises InvalidInput where there is nothing to judge the result by.
    """
    current = _model_before(workspace, number)
    validation = load_validation(workspace.store, method)
    rows = [row for row in workspace.store.training_rows(method) if not is_held_out(row)]
    rows = [row for row in rows if row.crystal.reduced_formula not in validation.formulas]
    crystals, targets = training_examples(rows, current.elements)
    device = device_of(workspace.settings)
    pack = PackedGraphs.from_crystals(crystals, current.members[0].settings.cutoff, device)
    train = Labelled(pack, torch.tensor(targets, dtype=torch.float32, device=device))
    recipe = EnsembleSettings(
        network=current.members[0].settings,
        train=replace(settings, seed=derived_seed(seed, number), precision=retraining_precision(precision, current.card, device)),
        members=len(current.members),
    )
    folder = workspace.settings.data_folder / "models"
    states = folder / f"training-{_digest(current.model_id, method, asdict(recipe), [row.id for row in rows])}"
    nothing = Labelled(PackedGraphs.from_crystals([], 1.0, device), torch.zeros(0, device=device))
    with workspace.listener.stage("retraining", recipe.members * settings.epochs, "epochs") as count:

        def on_epoch(_member: int, _record: EpochRecord) -> None:
            count()

        members = [
            train_member(i, recipe, train, nothing, initial=current.members[i], state_folder=states, on_epoch=on_epoch)
            for i in range(recipe.members)
        ]
    card = {
        **{key: current.card[key] for key in ("licences", "split") if key in current.card},
        "held_out": f"formulas of the buckets {HELD_OUT} (md5 of the reduced formula modulo 100) were not learnt from; they judge",
        "precision": recipe.train.precision,
        "method": method,
        "elements": sorted(current.elements & set().union(*(crystal.composition for crystal in crystals))),
        "parent": current.model_id,
        "learnt_up_to_round": number,
        "trained_on": f"fine-tuned from {current.model_id} on {len(crystals)} crystals of {method} up to round {number}",
    }
    card |= {
        "calibration": _calibration(members, card, validation),
        "calibrated_on": validation.source,
    }
    saved = save_ensemble(folder / "structural-{sha256}.safetensors", members, card)
    path = folder / f"structural-{saved['sha256'][:16]}.safetensors"
    shutil.rmtree(states, ignore_errors=True)
    return _judge(workspace, path, saved, current, validation, rows, number)


def _calibration(members: Sequence[Network], card: Mapping[str, Any], validation: ValidationSet) -> dict[str, float] | None:
    """Learn how far an ensemble is off for cells as they are; None where it ran away."""
    ensemble = StructuralEnsemble([member for member in members if isinstance(member, CrystalNetwork)], card)
    known = np.array([set(crystal.composition) <= ensemble.elements for crystal in validation.crystals])
    energies = ensemble.member_energies([crystal for crystal, ok in zip(validation.crystals, known, strict=True) if ok])[:, 0]
    if not np.isfinite(energies).all():
        return None
    return calibrate_crystals(energies, validation.e_form_per_atom[known], least=MIN_HELD_OUT)


def retraining_precision(asked: str, card: Mapping[str, Any], device: torch.device) -> Precision:
    """Return the precision asked for; of `auto`, on a GPU that in which the ensemble in use was trained, FP32 on a CPU and otherwise."""
    trained = card.get("precision") or card.get("training", {}).get("precision")
    wanted = asked if asked != AUTOMATIC else trained if device.type == "cuda" else "fp32"
    return cast(Precision, wanted if wanted in PRECISIONS else "fp32")


def _digest(*parts: Any) -> str:
    """Name a training by all that decides it, so that what another left behind is not taken up."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _model_before(workspace: Workspace, number: int) -> StructuralEnsemble:
    """Load the ensemble to start from: the one in use, or its parent where an interrupted run of this retraining has promoted it."""
    in_use = workspace.store.current_model("structural")
    if in_use is None or in_use.round != number:
        return workspace.structural_model()
    return workspace.structural_model(in_use.parent_id)


def training_examples(rows: list[TrainingRow], elements: frozenset[int]) -> tuple[list[Crystal], list[float]]:
    """Relaxed crystals, and what they were relaxed from, each with the relaxed energy; those with other elements are left out."""
    crystals, targets = [], []
    for row in rows:
        if not set(row.crystal.composition) <= elements:
            continue
        for crystal in (row.crystal, row.unrelaxed):
            if crystal is not None:
                crystals.append(crystal)
                targets.append(row.e_form_per_atom)
    return crystals, targets


def validation_error(
    model: EnergyModel, validation: ValidationSet, correction: Callable[[dict[int, int]], float] | None = None
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Absolute errors (n,) on the validation set at the volume as it was guessed, eV/atom; unknown elements count as 1 eV/atom off."""
    known = np.array([set(crystal.composition) <= model.elements for crystal in validation.crystals])
    errors = np.ones(len(known))
    crystals = [crystal for crystal, ok in zip(validation.crystals, known, strict=True) if ok]
    predicted = predict_energies(model, crystals, AS_GUESSED).e_form_per_atom
    if correction is not None:
        predicted = predicted + np.array([correction(crystal.composition) for crystal in crystals])
    errors[known] = np.abs(predicted - validation.e_form_per_atom[known])
    return np.nan_to_num(errors, nan=RAN_AWAY, posinf=RAN_AWAY)


def spread_evenly(items: Sequence[_Item], most: int) -> list[_Item]:
    """Choose at most so many items, spread over their order."""
    chosen = np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)
    return [items[i] for i in chosen]


def current_error(model: StructuralEnsemble, method: str, validation: ValidationSet, rows: Sequence[TrainingRow]) -> float:
    """Mean absolute error of an ensemble with an offset, as screening fits one, where it was trained on another method."""
    correction = None
    if model.method != method:
        fitted = spread_evenly(rows, MAX_CALIBRATION)
        offset = fit_offset(
            model,
            [row.crystal for row in fitted],
            [row.e_form_per_atom for row in fitted],
            method=method,
            settings=AS_GUESSED,
        )
        correction = offset.correction
    return float(validation_error(model, validation, correction).mean())


def _judge(
    workspace: Workspace,
    path: Path,
    card: dict[str, Any],
    current: StructuralEnsemble,
    validation: ValidationSet,
    rows: list[TrainingRow],
    number: int,
) -> Retraining:
    """Compare old and new on the validation set, register the new one, and promote it if it is not worse."""
    method = str(card["method"])
    before = current_error(current, method, validation, rows)
    errors = validation_error(StructuralEnsemble.load(path, device_of(workspace.settings)), validation)
    interval = bootstrap(mean_absolute_error, errors, np.zeros(len(errors)))
    metrics = {"validation_mae": vars(interval), "validation_mae_before": before, "n_validation": len(errors)}
    record = ModelRecord(
        id=card["sha256"][:16],
        kind="structural",
        path=str(path),
        sha256=card["sha256"],
        card=card,
        metrics=metrics,
        parent_id=current.model_id,
        round=number,
    )
    workspace.store.add_model(record)
    promoted = interval.value <= before
    if promoted:
        workspace.store.promote_model(record.id)
    else:
        workspace.store.retire_model(record.id)
    return Retraining(
        model_id=record.id,
        parent_id=current.model_id,
        promoted=promoted,
        n_training=len(rows),
        error_before=before,
        error_after=interval.value,
    )
