"""The round as plain Python: eight stages, each resumable, each a function of (workspace, round).

    propose -> calibrate -> look -> look_again -> screen -> select -> evaluate -> assess

A stage is cut into shards that the ledger keeps; what a shard writes is inserted idempotently and depends only on the database as it stood
before the stage, so a round that was killed anywhere ends with the tables of an unbroken one.  Prefect is not needed here.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final

import numpy as np

from flows.assess import assess, is_hit, update_hull
from flows.evaluating import evaluate_crystals
from flows.learning import MAX_CALIBRATION, load_validation, retrain, spread_evenly
from flows.proposing import allowed_elements, propose_compositional, propose_structural
from flows.records import candidate_from, prediction_from, prediction_record
from flows.seeding import seed_if_empty
from flows.settings import RoundSettings
from flows.workspace import Workspace
from gnome.database.leases import hold_round
from gnome.database.query import count as count_crystals
from gnome.database.records import RoundRecord
from gnome.errors import EvaluatorUnavailable, InvalidInput, RoundBusy
from gnome.models.ensemble import StructuralEnsemble
from gnome.quantities import STABLE_TOLERANCE, Quantity
from pipelines.candidate import Candidate
from pipelines.cascade import FIRST_LOOK, SECOND_LOOK, Look, go_on
from pipelines.offset import Offset
from pipelines.screening import Prediction, ScreeningSettings, fit_offset, screen
from pipelines.selection import Acquisition, GreedyAcquisition, Selected, SelectionSettings, StabilityAcquisition, select

STAGES: Final = ("propose", "calibrate", "look", "look_again", "screen", "select", "evaluate", "assess")
LOOK_SHARD: Final = 1000
LOOK_AGAIN_SHARD: Final = 200
SCREEN_SHARD: Final = 100
EVALUATE_SHARD: Final = 100

_BEFORE_IT_WAS_KEPT: Final[dict[str, Any]] = {"second_look": False, "over_volumes": "lowest", "acquisition": "greedy"}
"""What rounds do that began before a setting was kept with them."""

Result = dict[str, Any]
ShardRunner = Callable[[Workspace, int, str, int], Result]


def run_round(
    workspace: Workspace, settings: RoundSettings, *, run: ShardRunner | None = None, campaign: Mapping[str, int] | None = None
) -> RoundRecord:
    """Run the next round, or go on with the one that was interrupted (with its own settings).

    `run` runs one shard; by default in this process.  `campaign` is kept with a new round: `campaign_until` (the last round of its
    campaign) and `retrain_after`.
    Raises RoundBusy when another process runs a round on this database.
    """
    run = run or run_shard
    with hold_round(workspace.store):
        record = workspace.store.open_round() or begin_round(workspace, settings, campaign=campaign)
        for stage in STAGES:
            for shard in range(n_shards(workspace, record.number, stage)):
                run(workspace, record.number, stage, shard)
        return finish_round(workspace, record.number)


def begin_round(workspace: Workspace, settings: RoundSettings, *, campaign: Mapping[str, int] | None = None) -> RoundRecord:
    """Start a round after checking that its elements and evaluator can be served."""
    seed_if_empty(workspace)
    workspace.register_shipped_models()
    method = workspace.evaluator.method
    workspace.store.add_method(method)
    model, hull = workspace.structural_model(), workspace.hull(method.label)
    allowed_elements(settings, model.elements, hull.elements, workspace.evaluator.elements)
    settings = replace(settings, evaluator=workspace.evaluator_name)
    kept: dict[str, Any] = {"method": method.label, "model": model.model_id, "campaign": dict(campaign or {})}
    if "compositional" in settings.pipelines:
        kept["formula_model"] = workspace.formula_model().model_id
    return workspace.store.start_round({**settings.to_dict(), **kept}, settings.seed)


def n_shards(workspace: Workspace, number: int, stage: str) -> int:
    """Shards of a stage, known once the stages before it are done."""
    settings = round_settings(workspace, number)
    match stage:
        case "propose":
            return len(settings.pipelines)
        case "look":
            return _pieces(len(workspace.store.candidate_ids_of_round(number)), LOOK_SHARD)
        case "look_again":
            return _pieces(len(looked_again(workspace, number)), LOOK_AGAIN_SHARD) if settings.second_look else 0
        case "screen":
            return _pieces(len(looked_best(workspace, number)), SCREEN_SHARD)
        case "evaluate":
            return _pieces(len(chosen(workspace, number)), EVALUATE_SHARD)
        case _:
            return 1


def run_shard(workspace: Workspace, number: int, stage: str, shard: int) -> Result:
    """Run one shard unless it is done; returns its result, which the ledger keeps.

    Raises RoundBusy when another living process is at it.
    """
    ledger = workspace.ledger
    attempt = ledger.claim(number, stage, shard)
    if attempt is None:
        if ledger.state(number, stage, shard) == "done":
            return dict(ledger.result(number, stage, shard) or {})
        raise RoundBusy(f"shard {shard} of {stage} in round {number} is being worked on by another process")
    begin = time.perf_counter()
    try:
        result = _WORK[stage](workspace, number, shard)
    except Exception as error:
        ledger.fail(number, stage, shard, attempt, f"{type(error).__name__}: {error}")
        raise
    result["seconds"] = round(time.perf_counter() - begin, 3)
    ledger.complete(number, stage, shard, attempt, result)
    return result


def finish_round(workspace: Workspace, number: int) -> RoundRecord:
    """Close a round with its summary."""
    return workspace.store.finish_round(number, summarize(workspace, number))


def abandon_round(workspace: Workspace) -> RoundRecord:
    """Give up the unfinished round; what it answered is assessed and stays.  Raises InvalidInput when there is none."""
    with hold_round(workspace.store):
        unfinished = workspace.store.open_round()
        if unfinished is None:
            raise InvalidInput(f"{workspace.store.location} has no unfinished round")
        number = unfinished.number
        if workspace.ledger.state(number, "assess") != "done":
            run_shard(workspace, number, "assess", 0)
        return workspace.store.finish_round(number, summarize(workspace, number), failed=True)


def summarize(workspace: Workspace, number: int) -> Result:
    """Counts, hit rate, failures, seconds by stage, and how far the filter was off (eV/atom) for what was evaluated."""
    seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    for shard in workspace.ledger.shards(number):
        seconds[shard.stage] = round(seconds.get(shard.stage, 0.0) + (shard.result or {}).get("seconds", 0.0), 3)
    evaluations = workspace.store.evaluations_of_round(number)
    hits = [record for record in evaluations if is_hit(record)]
    predicted = {record.candidate_id: record.e_form_per_atom for record in workspace.store.predictions_of_round(number)}
    errors = [
        abs(predicted[record.candidate_id] - record.e_form_per_atom)
        for record in evaluations
        if record.converged and record.e_form_per_atom is not None
    ]
    return {
        "n_candidates": len(workspace.store.candidate_ids_of_round(number)),
        "n_screened": len(predicted),
        "n_evaluated": len(evaluations),
        "n_converged": sum(record.converged for record in evaluations),
        "n_novel": sum(bool(record.novel) for record in evaluations),
        "n_hits": len(hits),
        "n_stable": count_crystals(workspace.store, f"_gnome_round = {number} AND _gnome_e_above_hull <= {STABLE_TOLERANCE}"),
        "hit_rate": len(hits) / len(evaluations) if evaluations else None,
        "prediction_mae": float(np.mean(errors)) if errors else None,
        "failures": workspace.store.failures_of_round(number),
        "seconds": seconds,
        "cost_seconds": round(sum(record.cost_seconds for record in evaluations), 1),
        "offset_note": (workspace.ledger.result(number, "calibrate") or {}).get("note", ""),
    }


def round_settings(workspace: Workspace, number: int) -> RoundSettings:
    """Settings that the round began with."""
    stored = _BEFORE_IT_WAS_KEPT | dict(workspace.store.round(number).settings)
    known = {field.name for field in fields(RoundSettings)}  # the rest is the round's own, or an older program's
    return RoundSettings.from_dict({name: value for name, value in stored.items() if name in known})


def round_method(workspace: Workspace, number: int) -> str:
    """Label of the method whose hull the round works on."""
    return str(workspace.store.round(number).settings["method"])


def round_model(workspace: Workspace, number: int) -> StructuralEnsemble:
    """Load the ensemble that the round began with, whatever has been promoted since."""
    return workspace.structural_model(str(workspace.store.round(number).settings["model"]))


def _propose(workspace: Workspace, number: int, shard: int) -> Result:
    settings = round_settings(workspace, number)
    hull = workspace.hull(round_method(workspace, number), before_round=number)
    model = round_model(workspace, number)
    elements = allowed_elements(settings, model.elements, hull.elements, workspace.evaluator.elements)
    if settings.pipelines[shard] == "structural":
        return propose_structural(workspace, number, settings, hull, elements)
    return propose_compositional(workspace, number, settings, hull, elements)


def _calibrate(workspace: Workspace, number: int, _shard: int) -> Result:
    """Fit the offset from the model's method to the hull's on the crystals known before the round."""
    method = round_method(workspace, number)
    model = round_model(workspace, number)
    if model.method == method:
        return {"offset": None, "note": ""}
    known = list(workspace.store.crystals_of(method, before_round=number))
    known = [stored for stored in known if stored.crystal.n_atoms <= round_settings(workspace, number).max_atoms]
    fitted = spread_evenly(known, MAX_CALIBRATION)
    with workspace.listener.stage("calibrating the ensemble", 1, "fit") as count:
        offset = fit_offset(
            model,
            [stored.crystal for stored in fitted],
            [float(stored.row[Quantity.E_FORM_PER_ATOM]) for stored in fitted],
            method=method,
            settings=full_filter(round_settings(workspace, number)),
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


def offset_of(workspace: Workspace, number: int) -> Offset | None:
    """The offset that the round's screening uses."""
    stored = workspace.ledger.result(number, "calibrate") or {}
    return Offset.from_dict(stored["offset"]) if stored.get("offset") else None


def _look(workspace: Workspace, number: int, shard: int) -> Result:
    """Take a cheap first look at a thousand candidates."""
    ids = workspace.store.candidate_ids_of_round(number)[shard * LOOK_SHARD : (shard + 1) * LOOK_SHARD]
    return _take_look(workspace, number, ids, FIRST_LOOK, "first look")


def _look_again(workspace: Workspace, number: int, shard: int) -> Result:
    """Look more closely at two hundred of the best of the first look."""
    ids = looked_again(workspace, number)[shard * LOOK_AGAIN_SHARD : (shard + 1) * LOOK_AGAIN_SHARD]
    return _take_look(workspace, number, ids, SECOND_LOOK, "second look")


def _take_look(workspace: Workspace, number: int, ids: Sequence[str], look: Look, name: str) -> Result:
    ensemble = round_model(workspace, number)
    model = replace(ensemble, members=ensemble.members[: look.members])
    candidates = _load(workspace, ids)
    formulas = {candidate.id: candidate.crystal.reduced_formula for candidate in candidates}
    predictions, refusals = _screen(workspace, number, candidates, model, look.volumes, name)
    ranked = sorted((round(p.decomposition_energy, 6), p.candidate_id, formulas[p.candidate_id]) for p in predictions)
    return {"ranked": ranked, "refused": refusals}


def looked_again(workspace: Workspace, number: int) -> list[str]:
    """Ids that get the second look."""
    return _go_on(workspace, number, "look", round_settings(workspace, number).n_looked_again, FIRST_LOOK)


def looked_best(workspace: Workspace, number: int) -> list[str]:
    """Ids that get the full filter."""
    settings = round_settings(workspace, number)
    stage, look = ("look_again", SECOND_LOOK) if settings.second_look else ("look", FIRST_LOOK)
    return _go_on(workspace, number, stage, settings.n_screened, look)


def _go_on(workspace: Workspace, number: int, stage: str, n: int, look: Look) -> list[str]:
    """Ids of what goes on after a look, by id within equals; each its own composition in a look that kept no formulas, as older ones."""
    ranked = sorted(
        tuple(entry) for shard in workspace.ledger.shards(number, stage) for entry in (shard.result or {}).get("ranked", ())
    )
    ids = [entry[1] for entry in ranked]
    formulas = [entry[-1] for entry in ranked] if all(len(entry) > 2 for entry in ranked) else ids
    return [ids[i] for i in go_on([entry[0] for entry in ranked], formulas, n, within=look.within)]


def _screen_shard(workspace: Workspace, number: int, shard: int) -> Result:
    """Give a hundred candidates the full filter."""
    ids = looked_best(workspace, number)[shard * SCREEN_SHARD : (shard + 1) * SCREEN_SHARD]
    model = round_model(workspace, number)
    predictions, refusals = _screen(
        workspace, number, _load(workspace, ids), model, full_filter(round_settings(workspace, number)), "screening"
    )
    workspace.store.add_predictions([prediction_record(prediction) for prediction in predictions])
    return {"n": len(predictions), "refused": refusals, "method": predictions[0].method if predictions else ""}


def _screen(
    workspace: Workspace,
    number: int,
    candidates: Sequence[Candidate],
    model: StructuralEnsemble,
    settings: ScreeningSettings,
    name: str,
) -> tuple[list[Prediction], dict[str, int]]:
    hull = workspace.hull(round_method(workspace, number), before_round=number)
    offset = offset_of(workspace, number)
    predictions: list[Prediction] = []
    refusals: dict[str, int] = {}
    with workspace.listener.stage(name, len(candidates), "candidates") as count:
        for piece in np.array_split(np.arange(len(candidates)), _pieces(len(candidates), 50)):
            screening = screen([candidates[i] for i in piece], model, hull, settings, offset)
            predictions += screening.predictions
            for refusal in screening.refusals:
                refusals[refusal.reason] = refusals.get(refusal.reason, 0) + 1
            count(len(piece))
    return predictions, refusals


def _select(workspace: Workspace, number: int, _shard: int) -> Result:
    """Spend the budget: one structure a composition; where compositions are fewer than the budget, their next best follow."""
    settings = round_settings(workspace, number)
    remaining = workspace.store.predictions_of_round(number)
    candidates = {
        record.id: candidate_from(record) for record in workspace.store.candidates(p.candidate_id for p in remaining).values()
    }
    predictions = [prediction_from(record, round_method(workspace, number)) for record in remaining]
    order = SelectionSettings(acquisition=acquisition_of(workspace, number))
    chosen: list[Selected] = []
    while predictions and len(chosen) < settings.budget:
        chosen += select(predictions, list(candidates.values()), settings.budget - len(chosen), order)
        taken = {one.candidate.id for one in chosen}
        predictions = [prediction for prediction in predictions if prediction.candidate_id not in taken]
    return {
        "chosen": [one.candidate.id for one in chosen],
        "below_threshold": sum(one.below_threshold for one in chosen),
        "acquisition": order.acquisition.name,
    }


def acquisition_of(workspace: Workspace, number: int) -> Acquisition:
    """Return the order that the round's settings ask for; the greedy one, and a word, where errors are not known."""
    if round_settings(workspace, number).acquisition == "greedy":
        return GreedyAcquisition()
    offset = offset_of(workspace, number)
    calibration = round_model(workspace, number).calibration if offset is None else offset.calibration
    if calibration is None:
        workspace.listener.say(
            "The errors of the ensemble's predictions are not known: those deepest below the hull are evaluated."
        )
        return GreedyAcquisition()
    return StabilityAcquisition(calibration=calibration)


def chosen(workspace: Workspace, number: int) -> list[str]:
    """Ids that the budget is spent on, the best first."""
    return list((workspace.ledger.result(number, "select") or {}).get("chosen", ()))


def _evaluate(workspace: Workspace, number: int, shard: int) -> Result:
    """Relax what was chosen; every answer is stored as it comes."""
    method = workspace.evaluator.method.label
    if method != round_method(workspace, number):
        raise EvaluatorUnavailable(
            f"round {number} works on the hull of {round_method(workspace, number)}, {workspace.evaluator_name} now gives {method}; "
            "use the versions it began with, or give it up with `gnome campaign abandon`"
        )
    ids = chosen(workspace, number)[shard * EVALUATE_SHARD : (shard + 1) * EVALUATE_SHARD]
    return evaluate_crystals(workspace, number, {candidate.id: candidate.crystal for candidate in _load(workspace, ids)})


def _assess(workspace: Workspace, number: int, _shard: int) -> Result:
    """Find what is new, put it on the hull, and tell every crystal where it now stands."""
    method = round_method(workspace, number)
    order = {identifier: rank for rank, identifier in enumerate(chosen(workspace, number))}
    evaluations = sorted(
        workspace.store.evaluations_of_round(number),
        key=lambda record: (order.get(record.candidate_id, len(order)), record.candidate_id),
    )
    with workspace.listener.stage("updating the hull", 1, "hull") as count:
        found = assess(workspace.store, evaluations, workspace.hull(method, before_round=number), number)
        workspace.store.add_crystals(found.crystals)
        workspace.store.assess_evaluations(found.assessments)
        update_hull(workspace.store, method, changed=[record.crystal for record in found.crystals])
        count()
    return {"n_new": len(found.crystals)}


def _retrain(workspace: Workspace, number: int, _shard: int) -> Result:
    """Fine-tune the ensemble on all answers up to this round, if there is a validation set to judge it by."""
    method = round_method(workspace, number)
    try:
        load_validation(method)
    except InvalidInput as error:
        workspace.listener.say(f"Not retrained: {error}")
        return {"skipped": str(error)}
    return retrain(workspace, method, number, seed=round_settings(workspace, number).seed).to_dict()


def _load(workspace: Workspace, ids: Sequence[str]) -> list[Candidate]:
    found = workspace.store.candidates(ids)
    return [candidate_from(found[identifier]) for identifier in ids]


def _pieces(n: int, size: int) -> int:
    return max(1, -(-n // size))


_WORK: Final[Mapping[str, Callable[[Workspace, int, int], Result]]] = {
    "propose": _propose,
    "calibrate": _calibrate,
    "look": _look,
    "look_again": _look_again,
    "screen": _screen_shard,
    "select": _select,
    "evaluate": _evaluate,
    "assess": _assess,
    "retrain": _retrain,
}
