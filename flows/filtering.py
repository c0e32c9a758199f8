"""The filter's stages: predictions carried over to the hull's method, two quick looks, the full filter, and what the budget goes to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from dft_stub.evaluator import Failure
from flows.device import device_of
from flows.learning import MAX_CALIBRATION, spread_evenly, unrelaxed_examples
from flows.records import candidate_from, prediction_from, prediction_record
from flows.rounds import Result, formula_judge, load_candidates, n_pieces, offset_of, round_method, round_model, round_settings
from flows.settings import RoundSettings
from flows.workspace import Workspace
from gnome.models.energy_model import EnergyModel
from gnome.models.formula_ensemble import CompositionalEnsemble
from gnome.quantities import Quantity
from pipelines.candidate import Candidate
from pipelines.cascade import FIRST_LOOK, SECOND_LOOK, Look, go_on, looking
from pipelines.screening import Prediction, ScreeningSettings, fit_offset, screen
from pipelines.selection import Acquisition, GreedyAcquisition, SelectionSettings, StabilityAcquisition, select, standing_of
from pipelines.standing import LOOK_THRESHOLD, Doubt, FormulaJudge, ask_at_once

LOOK_SHARD: Final = 1000
LOOK_AGAIN_SHARD: Final = 200
SCREEN_SHARD: Final = 100
FAILURES_OF_CRYSTALS: Final = (Failure.REFUSED, Failure.UNSUPPORTED_ELEMENT, Failure.NOT_CONVERGED, Failure.IMPLAUSIBLE)
"""Failures that the same crystal would meet again; the others may be the machine's doing."""

PIECE: Final = {"cpu": 50, "cuda": LOOK_SHARD}
"""Candidates between two steps of the progress; a GPU needs many at once."""


def calibrate(workspace: Workspace, number: int, _shard: int) -> Result:
    """Fit the offset from the model's method to the hull's on the crystals known before the round."""
    method = round_method(workspace, number)
    model = round_model(workspace, number)
    if model.method == method or not workspace.store.candidate_ids_of_round(number):
        return {"offset": None, "note": ""}
    everything = list(workspace.store.crystals_of(method, before_round=number))
    settings = round_settings(workspace, number)
    known = [stored for stored in everything if stored.crystal.n_atoms <= settings.max_atoms] or everything
    fitted = spread_evenly(known, MAX_CALIBRATION)
    before = (row for row in workspace.store.training_rows(method) if row.round is None or row.round < number)
    with workspace.listener.stage("calibrating the ensemble", 1, "fit") as count:
        offset = fit_offset(
            model,
            [stored.crystal for stored in fitted],
            [float(stored.row[Quantity.E_FORM_PER_ATOM]) for stored in fitted],
            method=method,
            settings=full_filter(settings),
            unrelaxed=unrelaxed_examples(method, before),
        )
        count()
    return {"offset": offset.to_dict(), "note": offset.note}


def full_filter(settings: RoundSettings) -> ScreeningSettings:
    """All members at all volumes of the round's settings."""
    return ScreeningSettings(
        n_scales=settings.n_scales,
        smallest_scale=settings.smallest_scale,
        largest_scale=settings.largest_scale,
        over_volumes=settings.over_volumes,
    )


def look(workspace: Workspace, number: int, shard: int) -> Result:
    """Take a cheap first look at a thousand candidates."""
    ids = workspace.store.candidate_ids_of_round(number)
    return _take_look(workspace, number, ids, slice(shard * LOOK_SHARD, (shard + 1) * LOOK_SHARD), FIRST_LOOK, "first look")


def look_again(workspace: Workspace, number: int, shard: int) -> Result:
    """Look more closely at two hundred of the best of the first look."""
    ids, piece = looked_again(workspace, number), slice(shard * LOOK_AGAIN_SHARD, (shard + 1) * LOOK_AGAIN_SHARD)
    return _take_look(workspace, number, ids, piece, SECOND_LOOK, "second look")


def _take_look(workspace: Workspace, number: int, ids: Sequence[str], piece: slice, look: Look, name: str) -> Result:
    model = looking(round_model(workspace, number), look)
    candidates = load_candidates(workspace, ids[piece])
    judge = formula_judge(workspace, number)
    judge = None if judge is None else CompositionalEnsemble(judge.members[: look.members], judge.card)
    part = _Part(name=name, before=piece.start, whole=len(ids))
    predictions, refusals = _screen(workspace, number, candidates, part, model, look.volumes, judge)
    by_id = {candidate.id: candidate for candidate in candidates}
    ranked = sorted(
        (
            round(p.decomposition_energy, 6),
            p.candidate_id,
            bool(_doubts_at_a_look(p, by_id[p.candidate_id])),
            by_id[p.candidate_id].crystal.reduced_formula,
        )
        for p in predictions
    )
    return {"ranked": ranked, "refused": refusals}


def _doubts_at_a_look(prediction: Prediction, candidate: Candidate) -> tuple[Doubt, ...]:
    """What speaks against a candidate as far as few networks can tell; the spread of so few says nothing of how probably it is stable."""
    return standing_of(replace(prediction, p_stable=None), candidate).doubts(LOOK_THRESHOLD)


def looked_again(workspace: Workspace, number: int) -> list[str]:
    """Ids that get the second look."""
    return _go_on(workspace, number, "look", round_settings(workspace, number).n_looked_again, FIRST_LOOK)


def looked_best(workspace: Workspace, number: int) -> list[str]:
    """Ids that get the full filter."""
    settings = round_settings(workspace, number)
    stage, look = ("look_again", SECOND_LOOK) if settings.second_look else ("look", FIRST_LOOK)
    return _go_on(workspace, number, stage, settings.n_screened, look)


def _go_on(workspace: Workspace, number: int, stage: str, n: int, look: Look) -> list[str]:
    """Ids of what goes on after a look, by id within equals; older looks kept no doubts, or no formulas either."""
    ranked = sorted(
        tuple(entry) for shard in workspace.ledger.shards(number, stage) for entry in (shard.result or {}).get("ranked", ())
    )
    ids = [entry[1] for entry in ranked]
    formulas = [entry[-1] for entry in ranked] if all(len(entry) > 2 for entry in ranked) else ids
    doubtful = [entry[2] for entry in ranked] if all(len(entry) > 3 for entry in ranked) else None
    return [ids[i] for i in go_on([entry[0] for entry in ranked], formulas, n, within=look.within, doubtful=doubtful)]


def screen_shard(workspace: Workspace, number: int, shard: int) -> Result:
    """Give a hundred candidates the full filter."""
    ids, before = looked_best(workspace, number), shard * SCREEN_SHARD
    candidates = load_candidates(workspace, ids[before : before + SCREEN_SHARD])
    settings, judge = full_filter(round_settings(workspace, number)), formula_judge(workspace, number)
    part = _Part(name="screening", before=before, whole=len(ids))
    predictions, refusals = _screen(workspace, number, candidates, part, round_model(workspace, number), settings, judge)
    workspace.store.add_predictions([prediction_record(prediction) for prediction in predictions])
    return {"n": len(predictions), "refused": refusals, "method": predictions[0].method if predictions else ""}


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Which part of a stage a shard is, for the progress: its name, candidates before it, and all."""

    name: str
    before: int
    whole: int


def _screen(
    workspace: Workspace,
    number: int,
    candidates: Sequence[Candidate],
    part: "_Part",
    model: EnergyModel,
    settings: ScreeningSettings,
    judge: FormulaJudge | None,
) -> tuple[list[Prediction], dict[str, int]]:
    predictions: list[Prediction] = []
    refusals: dict[str, int] = {}
    if not candidates:
        return predictions, refusals
    hull = workspace.hull(round_method(workspace, number), before_round=number)
    offset = offset_of(workspace, number)
    if judge is not None:
        judge = ask_at_once(judge, [candidate.crystal.composition for candidate in candidates])
    with workspace.listener.stage(part.name, len(candidates), "candidates", before=part.before, whole=part.whole) as count:
        size = PIECE[device_of(workspace.settings).type]
        for piece in np.array_split(np.arange(len(candidates)), n_pieces(len(candidates), size)):
            screening = screen([candidates[i] for i in piece], model, hull, settings, offset, judge)
            predictions += screening.predictions
            for refusal in screening.refusals:
                refusals[refusal.reason] = refusals.get(refusal.reason, 0) + 1
            count(len(piece))
    return predictions, refusals


def select_shard(workspace: Workspace, number: int, _shard: int) -> Result:
    """Spend the budget; see `pipelines.selection.select`."""
    settings = round_settings(workspace, number)
    method = round_method(workspace, number)
    kept = [prediction_from(record, method) for record in workspace.store.predictions_of_round(number)]
    predictions = [prediction for prediction in kept if prediction is not None]
    candidates = workspace.store.candidates(prediction.candidate_id for prediction in predictions)
    acquisition = acquisition_of(workspace, settings, predictions)
    chosen = select(
        predictions,
        [candidate_from(record) for record in candidates.values()],
        settings.budget,
        SelectionSettings(acquisition=acquisition),
        failed=[
            record.crystal
            for record in workspace.store.failed_candidates(method, before_round=number, reasons=FAILURES_OF_CRYSTALS)
        ],
    )
    return {
        "chosen": [one.candidate.id for one in chosen],
        "below_threshold": sum(one.below_threshold for one in chosen),
        "doubtful": sum(bool(one.doubts) for one in chosen),
        "without_energy": len(kept) - len(predictions),
        "acquisition": acquisition.name,
    }


def acquisition_of(workspace: Workspace, settings: RoundSettings, predictions: Sequence[Prediction]) -> Acquisition:
    """Return the order that the round's settings ask for; the greedy one, and a word, where no probability is known."""
    if settings.acquisition == "greedy":
        return GreedyAcquisition()
    if predictions and all(prediction.p_stable is None for prediction in predictions):
        workspace.listener.say(
            "The errors of the ensemble's predictions are not known: those deepest below the hull are evaluated."
        )
        return GreedyAcquisition()
    return StabilityAcquisition()
