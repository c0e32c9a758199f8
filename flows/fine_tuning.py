"""`gnome train --fine-tune`: an ensemble that knows much, taught a few dozen crystals of another method.

Every member leaves a fifth of the formulas out, another than its neighbours, so that each crystal is answered by members that did not learn
it: what is said of the errors is measured on all crystals without any being lost to learning.  Three ensembles are compared so: the one
that was there, the same with a number for each element (ridge regression of its errors on the composition), and the latter trained for a
few epochs at a low rate.  The best is kept, which is none where nothing was gained; what is said of its errors on one part of the formulas
is of the ensemble that is best on the other parts, so that choosing does not flatter what is chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray

from flows.progress import Listener
from flows.training import check_out, forget_states, only_training, state_folder
from flows.training_data import labelled_crystals
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import MAX_ATOMIC_NUMBER, SYMBOLS
from gnome.crystals.formula import split_bucket
from gnome.errors import GnomeError, InvalidInput
from gnome.graphs.crystal_graph import PackedGraphs
from gnome.models.calibration import ErrorCalibration
from gnome.models.checkpoint import load_ensemble, save_ensemble
from gnome.models.datasets import VALIDATION_BUCKETS
from gnome.models.ensemble import CrystalNetwork, StructuralEnsemble, median_and_spread
from gnome.models.memory import memory_named
from gnome.models.metrics import Array, Interval, atomic_fractions, bootstrap, score
from gnome.models.ranks import Ranks
from gnome.models.recipes import EnsembleSettings, train_member, untrained
from gnome.models.training import EpochRecord, Labelled, TrainSettings
from gnome.shipped import shipped_data

GENTLE: Final = TrainSettings(epochs=10, batch_size=16, learning_rate=2e-4, weight_decay=0.0, warm_up=0.1, volume_jitter=0.1)
"""Few epochs at a low rate; benchmarks/fine_tuning.py measures what they gain."""
FOLDS: Final = 5
MIN_CRYSTALS, MIN_FORMULAS = 20, 10
MIN_CALIBRATION: Final = 30
"""Crystals below which nothing is said of how far predictions are off."""
AS_IT_WAS, SHIFTED, TRAINED = "as it was", "a number for each element", "a number for each element, and training"


@dataclass(frozen=True, kw_only=True)
class FineTuneRequest:
    """What `gnome train --fine-tune` was asked for; `start` are the weights to begin with, the shipped ones unless given."""

    files: tuple[Path, ...]
    out: Path
    method: str
    start: Path | None = None
    energy_key: str = ""
    members: int | None = None
    train: TrainSettings = GENTLE

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        check_out(self.out, self.files, self.method)

    @property
    def weights(self) -> Path:
        """The weights to begin with."""
        return self.start or shipped_data() / "ensembles" / "structural.safetensors"


@dataclass(frozen=True)
class _Examples:
    """Crystals with their labels (n,), the fold of each, and which are held out from all members."""

    crystals: list[Crystal]
    labels: Array
    folds: NDArray[np.int64]
    held_out: NDArray[np.bool_]

    def learnt_by(self, member: int) -> NDArray[np.bool_]:
        """Which crystals a member learns."""
        return ~self.held_out & (self.folds != member % FOLDS)


def fine_tune(request: FineTuneRequest, listener: Listener) -> dict[str, Any]:
    """Fine-tune and measure; returns the card as it was written.

    Raises GnomeError where nothing was gained; nothing is written then.
    """
    ranks = Ranks.from_environment()
    if ranks.world > 1:
        raise InvalidInput("--fine-tune runs in one process; start it without torchrun")
    start = StructuralEnsemble.load(request.weights, ranks.device)
    if not 1 <= (n := request.members or len(start.members)) <= len(start.members):
        raise InvalidInput(f"--members {n}: {request.weights} has {len(start.members)}")
    start = replace(start, members=start.members[:n])
    examples = _examples(request, start)
    with only_training(request.out):
        return _tuned(request, start, examples, listener, ranks.device)


def _examples(request: FineTuneRequest, start: StructuralEnsemble) -> _Examples:
    crystals, labels = labelled_crystals(request.files, energy_key=request.energy_key)
    if unknown := sorted({z for crystal in crystals for z in crystal.composition} - start.elements):
        raise InvalidInput(
            f"{', '.join(SYMBOLS[z] for z in unknown)}: the ensemble to begin with was not trained on it; leave its crystals out, or train "
            "a new ensemble without --fine-tune"
        )
    formulas = [crystal.reduced_formula for crystal in crystals]
    held_out = np.array([split_bucket(formula) in VALIDATION_BUCKETS for formula in formulas], dtype=bool)
    learnt = sorted({formula for formula, out in zip(formulas, held_out, strict=True) if not out}, key=_by_hash)
    if (n := int((~held_out).sum())) < MIN_CRYSTALS or len(learnt) < MIN_FORMULAS:
        raise InvalidInput(
            f"{n} crystals of {len(learnt)} formulas to learn from (without those of the buckets {VALIDATION_BUCKETS[0]} to "
            f"{VALIDATION_BUCKETS[-1]}, which are held out); at least {MIN_CRYSTALS} of {MIN_FORMULAS} are needed"
        )
    fold = {formula: place % FOLDS for place, formula in enumerate(learnt)}
    return _Examples(crystals, labels, np.array([fold.get(formula, -1) for formula in formulas]), held_out)


def _by_hash(formula: str) -> tuple[int, str]:
    """Order formulas as if by chance, the same each time."""
    return split_bucket(formula), formula


def _tuned(
    request: FineTuneRequest, start: StructuralEnsemble, examples: _Examples, listener: Listener, device: torch.device
) -> dict[str, Any]:
    answers = {AS_IT_WAS: start.member_energies(examples.crystals)[:, 0]}
    shifted = [_shifted(member, i, examples, answers[AS_IT_WAS][i], device) for i, member in enumerate(start.members)]
    candidates: dict[str, Sequence[CrystalNetwork]] = {AS_IT_WAS: start.members, SHIFTED: shifted}
    candidates[TRAINED] = _trained(request, shifted, examples, listener, device)
    for name in (SHIFTED, TRAINED):
        answers[name] = replace(start, members=candidates[name]).member_energies(examples.crystals)[:, 0]
    unseen = np.array([~examples.learnt_by(i) for i in range(len(start.members))])
    measured = unseen.any(axis=0)
    predicted = {name: _by_unseen(energies, unseen)[measured] for name, energies in answers.items()}
    labels = examples.labels[measured]
    errors = {name: np.abs(np.nan_to_num(one, nan=np.inf) - labels) for name, one in predicted.items()}
    best = min(errors, key=lambda name: float(errors[name].mean()))
    if best == AS_IT_WAS:
        forget_states(request.out, len(shifted))
        tried = min(float(errors[name].mean()) for name in (SHIFTED, TRAINED))
        raise GnomeError(
            f"fine-tuning gained nothing: {errors[AS_IT_WAS].mean():.4f} eV/atom before, {tried:.4f} after, on {len(labels)} crystals that "
            "the networks which answer had not learnt; nothing was written, go on with the ensemble as it is, or give more crystals"
        )
    formulas = [examples.crystals[i].reduced_formula for i in np.flatnonzero(measured)]
    reported = _chosen_elsewhere(predicted, errors, examples.folds[measured])
    difference = _difference(np.abs(reported - labels) - errors[AS_IT_WAS], formulas)
    card = _card(request, start, examples, best) | {
        "calibration": _calibration(labels - reported, answers[AS_IT_WAS][:, measured]),
        "calibrated_on": "errors on crystals that the networks which answer had not learnt, by the spread of the ensemble it comes from",
        "metrics": {
            f"before, {start.model_id}": score(predicted[AS_IT_WAS], labels),
            "structural ensemble, fine-tuned": score(reported, labels),
        },
        "difference": vars(difference),
        "improved": difference.high < 0,
    }
    card = save_ensemble(request.out, candidates[best], card)
    load_ensemble(request.out)
    forget_states(request.out, len(shifted))
    return card


def _chosen_elsewhere(predicted: Mapping[str, Array], errors: Mapping[str, Array], parts: NDArray[np.int64]) -> Array:
    """Predictions (n,) for each part of the crystals by whichever ensemble errs least on the other parts."""
    chosen = np.empty(len(parts))
    for part in np.unique(parts):
        here = parts == part
        elsewhere = here if here.all() else ~here
        best = min(errors, key=lambda name: float(errors[name][elsewhere].mean()))
        chosen[here] = predicted[best][here]
    return chosen


def _by_unseen(energies: Array, unseen: NDArray[np.bool_]) -> Array:
    """Medians (n,) of energies (members, n) over the members that had not learnt a crystal; NaN where there are none."""
    masked = np.where(unseen, energies, np.nan)
    out = np.full(energies.shape[1], np.nan)
    some = unseen.any(axis=0)
    out[some] = np.nanmedian(masked[:, some], axis=0)
    return out


def _difference(differences: Array, formulas: Sequence[str]) -> Interval:
    """Mean change of the error with its interval, over formulas: crystals of one formula err alike."""
    together: dict[str, list[float]] = {}
    for formula, one in zip(formulas, differences.tolist(), strict=True):
        together.setdefault(formula, []).append(one)
    return bootstrap(lambda means: float(means.mean()), np.array([np.mean(own) for own in together.values()]))


def _calibration(errors: Array, energies_before: Array) -> dict[str, float] | None:
    made = ErrorCalibration.fit(errors, median_and_spread(energies_before)[1], least=MIN_CALIBRATION)
    return None if made is None else dict(vars(made))


def element_shifts(compositions: Sequence[Mapping[int, int]], errors: Array) -> Array:
    """Learn a number for each element (104,), eV/atom, whose mean over a crystal's atoms makes up for an error (n,).

    Ridge regression towards none, as strong as leaves the least mean error on crystals left out in turn; all 0 where none is best.
    """
    shares = atomic_fractions(compositions)
    values, vectors = np.linalg.eigh(shares @ shares.T)
    turned = vectors.T @ errors
    best, found = float(np.abs(errors).mean()), np.zeros(shares.shape[1])
    for strength in np.logspace(-3, 3, 25):
        inverse = (vectors / (np.maximum(values, 0) + strength)) @ vectors.T
        weights = vectors @ (turned / (np.maximum(values, 0) + strength))
        left_out = float(np.abs(weights / np.diag(inverse)).mean())
        if left_out < best:
            best, found = left_out, shares.T @ weights
    return np.asarray(found)


def _shifted(member: CrystalNetwork, index: int, examples: _Examples, energies: Array, device: torch.device) -> CrystalNetwork:
    """Copy a member, with what its errors on the crystals that it may learn say of the elements."""
    rows = np.flatnonzero(examples.learnt_by(index))
    compositions = [examples.crystals[i].composition for i in rows]
    shifts = element_shifts(compositions, examples.labels[rows] - energies[rows])
    copy = untrained(replace(member.settings, shifts_elements=True))
    assert isinstance(copy, CrystalNetwork) and copy.elements is not None  # noqa: S101, PT018 - as the settings say
    before = dict(member.state_dict())
    kept = before.pop("elements.shift", torch.zeros(MAX_ATOMIC_NUMBER + 1)).cpu()
    copy.load_state_dict({**before, "elements.shift": kept + torch.from_numpy(shifts).float()})
    return copy.to(device)


def _trained(
    request: FineTuneRequest, shifted: Sequence[CrystalNetwork], examples: _Examples, listener: Listener, device: torch.device
) -> list[CrystalNetwork]:
    recipe = EnsembleSettings(network=shifted[0].settings, train=request.train, members=len(shifted))
    nothing = Labelled(PackedGraphs.from_crystals([], 1.0, device), torch.zeros(0, device=device))
    members = []
    with listener.stage("fine-tuning", len(shifted) * request.train.epochs, "epochs") as count:

        def on_epoch(_member: int, _record: EpochRecord) -> None:
            count()

        for index, network in enumerate(shifted):
            rows = np.flatnonzero(examples.learnt_by(index))
            with memory_named(f"batches of {request.train.batch_size} are too large: give less"):
                pack = PackedGraphs.from_crystals([examples.crystals[i] for i in rows], network.settings.cutoff, device)
                train = Labelled(pack, torch.tensor(examples.labels[rows], dtype=torch.float32, device=device))
                trained = train_member(
                    index, recipe, train, nothing, initial=network, state_folder=state_folder(request.out), on_epoch=on_epoch
                )
            members.append(cast(CrystalNetwork, trained.eval()))
    return members


def _card(request: FineTuneRequest, start: StructuralEnsemble, examples: _Examples, best: str) -> dict[str, Any]:
    """What the card says of where the ensemble comes from; of another method it knows the elements alone that it has seen."""
    learnt = [crystal for crystal, out in zip(examples.crystals, examples.held_out, strict=True) if not out]
    seen = {z for crystal in learnt for z in crystal.composition}
    files = ", ".join(path.name for path in request.files)
    return {
        **{key: start.card[key] for key in ("licences",) if key in start.card},
        "method": request.method,
        "elements": sorted(start.elements if request.method == start.method else seen),
        "parent": start.model_id,
        "trained_on": f"fine-tuned from {start.model_id} ({start.method}) on {len(learnt)} crystals of {files}: {best}",
        "split": f"each member leaves out one of {FOLDS} parts of the formulas, and nothing learns those of the buckets "
        f"{VALIDATION_BUCKETS[0]} to {VALIDATION_BUCKETS[-1]} (md5 of the reduced formula modulo 100)",
        "precision": request.train.precision,
    }
