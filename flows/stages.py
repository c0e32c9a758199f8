"""The round as plain Python: eight stages, each resumable, each a function of (workspace, round).

    propose -> calibrate -> look -> look_again -> screen -> select -> evaluate -> assess

A stage is cut into shards that the ledger keeps; what a shard writes is inserted idempotently and depends only on the database as it stood
before the stage, so a round that was killed anywhere ends with the tables of an unbroken one.  Prefect is not needed here.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from flows.assess import assess, hits_of_round, update_hull
from flows.evaluating import evaluate_crystals
from flows.expected import expected_compounds
from flows.filtering import (
    LOOK_AGAIN_SHARD,
    LOOK_SHARD,
    SCREEN_SHARD,
    calibrate,
    look,
    look_again,
    looked_again,
    looked_best,
    screen_shard,
    select_shard,
)
from flows.learning import load_validation, retrain
from flows.proposing import allowed_elements, propose_compositional, propose_structural
from flows.reports import expected_line
from flows.rounds import Result, chosen, load_candidates, n_pieces, round_method, round_model, round_settings
from flows.seeding import add_seeds
from flows.settings import AUTOMATIC, RoundSettings
from flows.workspace import Workspace
from gnome.database.leases import hold_round
from gnome.database.query import count as count_crystals
from gnome.database.records import RoundRecord
from gnome.errors import EvaluatorUnavailable, InvalidInput, RoundBusy
from gnome.quantities import STABLE_TOLERANCE

STAGES: Final = ("propose", "calibrate", "look", "look_again", "screen", "select", "evaluate", "assess")
EVALUATE_SHARD: Final = 100

ShardRunner = Callable[[Workspace, int, str, int], Result]


def run_round(
    workspace: Workspace, settings: RoundSettings, *, run: ShardRunner | None = None, campaign: Mapping[str, Any] | None = None
) -> RoundRecord:
    """Run the next round, or go on with the one that was interrupted (with its own settings).

    `run` runs one shard; by default in this process.  `campaign` is kept with a new round: `campaign_until` (the last round of its
    campaign), `retrain_after` and `precision`.
    Raises RoundBusy when another process runs a round on this database.
    """
    run = run or run_shard
    with hold_round(workspace.store):
        record = workspace.store.open_round() or begin_round(workspace, settings, campaign=campaign)
        for stage in STAGES:
            for shard in range(n_shards(workspace, record.number, stage)):
                run(workspace, record.number, stage, shard)
        return finish_round(workspace, record.number)


def begin_round(workspace: Workspace, settings: RoundSettings, *, campaign: Mapping[str, Any] | None = None) -> RoundRecord:
    """Start a round after checking that its elements and evaluator can be served."""
    add_seeds(workspace)
    workspace.register_shipped_models()
    method = workspace.evaluator.method
    workspace.store.add_method(method)
    model, hull = workspace.structural_model(), workspace.hull(method.label)
    allowed_elements(settings, model.elements, hull.elements, workspace.evaluator.elements)
    settings = replace(settings, evaluator=workspace.evaluator_name)
    kept: dict[str, Any] = {"method": method.label, "model": model.model_id, "campaign": dict(campaign or {})}
    if settings.formula_check or "compositional" in settings.pipelines:
        judge = workspace.formula_model()
        kept["formula_model"] = judge.model_id
        known = workspace.store.formulas()  # under any method
        kept["expected"] = expected_compounds(settings.elements, known, judge) if settings.elements else []
        if kept["expected"]:
            workspace.listener.say(expected_line(settings.elements, kept["expected"]))
    return workspace.store.start_round({**settings.to_dict(), **kept}, settings.seed)


def n_shards(workspace: Workspace, number: int, stage: str) -> int:
    """Shards of a stage, known once the stages before it are done."""
    settings = round_settings(workspace, number)
    match stage:
        case "propose":
            return len(settings.pipelines)
        case "look":
            return n_pieces(len(workspace.store.candidate_ids_of_round(number)), LOOK_SHARD)
        case "look_again":
            return n_pieces(len(looked_again(workspace, number)), LOOK_AGAIN_SHARD) if settings.second_look else 0
        case "screen":
            return n_pieces(len(looked_best(workspace, number)), SCREEN_SHARD)
        case "evaluate":
            return n_pieces(len(chosen(workspace, number)), EVALUATE_SHARD)
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
    """Give up the unfinished round; what it answered is assessed and stays, as far as that can be done.

    Raises InvalidInput when there is none.
    """
    with hold_round(workspace.store):
        unfinished = workspace.store.open_round()
        if unfinished is None:
            raise InvalidInput(f"{workspace.store.location} has no unfinished round")
        number = unfinished.number
        summary: Result = {}
        try:  # whatever is wrong with what was answered, nobody is kept waiting by a round that cannot end
            if workspace.ledger.state(number, "assess") != "done":
                run_shard(workspace, number, "assess", 0)
            summary = summarize(workspace, number)
        except Exception as error:
            what = "summed up" if workspace.ledger.state(number, "assess") == "done" else "assessed to the end"
            summary["not_assessed"] = f"{type(error).__name__}: {error}"
            workspace.listener.say(f"What round {number} answered could not be {what}: {error}")
        summary["n_kept"] = count_crystals(workspace.store, f"_gnome_round = {number}")
        return workspace.store.finish_round(number, summary, failed=True)


def summarize(workspace: Workspace, number: int) -> Result:
    """Counts, hit rate, failures, seconds by stage, and how far the filter was off (eV/atom) for what was evaluated."""
    seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    for shard in workspace.ledger.shards(number):
        seconds[shard.stage] = round(seconds.get(shard.stage, 0.0) + (shard.result or {}).get("seconds", 0.0), 3)
    evaluations = workspace.store.evaluations_of_round(number)
    hits = hits_of_round(workspace.store, number, round_method(workspace, number))
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
        "hits": hits,
        "n_stable": count_crystals(workspace.store, f"_gnome_round = {number} AND _gnome_e_above_hull <= {STABLE_TOLERANCE}"),
        "hit_rate": len(hits) / len(evaluations) if evaluations else None,
        "prediction_mae": float(np.mean(errors)) if errors else None,
        "emptied_by": _emptied_by(workspace, number, len(evaluations), len(predicted)),
        "failures": workspace.store.failures_of_round(number),
        "seconds": seconds,
        "cost_seconds": round(sum(record.cost_seconds for record in evaluations), 1),
        "offset_note": (workspace.ledger.result(number, "calibrate") or {}).get("note", ""),
    }


def _propose(workspace: Workspace, number: int, shard: int) -> Result:
    settings = round_settings(workspace, number)
    hull = workspace.hull(round_method(workspace, number), before_round=number)
    model = round_model(workspace, number)
    elements = allowed_elements(settings, model.elements, hull.elements, workspace.evaluator.elements)
    if settings.pipelines[shard] == "structural":
        return propose_structural(workspace, number, settings, hull, elements)
    return propose_compositional(workspace, number, settings, hull, elements)


def _evaluate(workspace: Workspace, number: int, shard: int) -> Result:
    """Relax what was chosen; every answer is stored as it comes."""
    method = workspace.evaluator.method.label
    if method != round_method(workspace, number):
        raise EvaluatorUnavailable(
            f"round {number} works on the hull of {round_method(workspace, number)}, {workspace.evaluator_name} now gives {method}; "
            "use the versions it began with, or give it up with `gnome campaign abandon`"
        )
    ids = chosen(workspace, number)[shard * EVALUATE_SHARD : (shard + 1) * EVALUATE_SHARD]
    return evaluate_crystals(
        workspace, number, {candidate.id: candidate.crystal for candidate in load_candidates(workspace, ids)}
    )


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
        load_validation(workspace.store, method)
    except InvalidInput as error:
        workspace.listener.say(f"Not retrained: {error}")
        return {"skipped": str(error)}
    campaign = workspace.store.round(number).settings.get("campaign") or {}
    precision = str(campaign.get("precision", AUTOMATIC))
    return retrain(workspace, method, number, seed=round_settings(workspace, number).seed, precision=precision).to_dict()


def _emptied_by(workspace: Workspace, number: int, n_evaluated: int, n_screened: int) -> str:
    """Say which stage left nothing to the next, and why as far as it is known; empty where something was evaluated."""
    if n_evaluated:
        return ""
    if not workspace.store.candidate_ids_of_round(number):
        n_known = workspace.store.count_crystals(round_method(workspace, number), before_round=number)
        settings = round_settings(workspace, number)
        within = f" within {', '.join(settings.elements)}" if settings.elements else ""
        return (
            f"propose: the generators ({settings.generator}) made no new composition{within} out of {n_known} known crystals; import more "
            f"of what is known there{'' if settings.generator == 'both' else ', propose by --generator both,'} or allow more elements"
        )
    for stage in ("look", "look_again", "screen"):
        results = [shard.result or {} for shard in workspace.ledger.shards(number, stage)]
        refused: dict[str, int] = {}
        for reason, n in (pair for result in results for pair in result.get("refused", {}).items()):
            refused[reason] = refused.get(reason, 0) + n
        if refused and not any(result.get("ranked") or result.get("n") for result in results):
            return f"{stage}: every candidate was refused ({', '.join(f'{n} {reason}' for reason, n in refused.items())})"
    return "select: no candidate was chosen" if n_screened else "screen: no candidate got a prediction"


_WORK: Final[Mapping[str, Callable[[Workspace, int, int], Result]]] = {
    "propose": _propose,
    "calibrate": calibrate,
    "look": look,
    "look_again": look_again,
    "screen": screen_shard,
    "select": select_shard,
    "evaluate": _evaluate,
    "assess": _assess,
    "retrain": _retrain,
}
