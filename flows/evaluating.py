"""Handing crystals to an evaluator and storing every answer as it comes."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from dft_stub.admission import admit
from dft_stub.evaluator import Evaluation, Evaluator, Failure
from flows.records import evaluation_record
from flows.rounds import chosen
from flows.workspace import Workspace
from gnome.crystals.crystal import Crystal
from gnome.database.records import EvaluationRecord
from gnome.errors import EvaluatorUnavailable

OF_THE_MACHINE: Final = frozenset({Failure.TIMEOUT, Failure.CRASHED, Failure.OUT_OF_MEMORY})


def answers(evaluator: Evaluator, crystals: Mapping[str, Crystal]) -> Iterator[Evaluation]:
    """Hand crystals in and yield every answer as it comes, what cannot be true as a failure.

    Raises EvaluatorUnavailable at the end when some have no answer yet: what is asked again later is answered then; at once when there
    is an answer that nobody asked for.
    """
    ticket = evaluator.submit(crystals)
    for answer in evaluator.collect(ticket):
        if answer.id not in crystals:
            raise EvaluatorUnavailable(
                f"{evaluator.name} answers for {answer.id!r}, which it was not asked for; what it answered before is kept, mend it and "
                "give the same command again"
            )
        yield admit(answer, crystals[answer.id], evaluator.method, gate=evaluator.gate)
    if waiting := evaluator.pending(ticket):
        raise EvaluatorUnavailable(
            f"{len(waiting)} of {len(crystals)} evaluations by {evaluator.name} have no answer yet; "
            "give the same command again when they have"
        )


def evaluate_crystals(workspace: Workspace, number: int, crystals: Mapping[str, Crystal]) -> dict[str, Any]:
    """Evaluate what has no answer yet; an interruption loses nothing that was answered.

    What failed in a way that may be the machine's doing is tried once more before it counts, where that is to compute again; its record
    keeps the cost of both attempts.
    """
    computes = workspace.evaluator.computes
    known = {record.candidate_id: record for record in workspace.store.evaluations_of_round(number)}
    waiting = {identifier: crystal for identifier, crystal in crystals.items() if identifier not in known}
    again = {identifier: crystals[identifier] for identifier in crystals if computes and _is_worth_another(known.get(identifier))}
    n_waiting = len(waiting)
    failures: dict[str, int] = {}
    every = chosen(workspace, number)
    before = min((every.index(identifier) for identifier in crystals if identifier in every), default=0)
    with workspace.listener.stage(
        "evaluating", len(crystals), "crystals", before=before, whole=max(len(every), before + len(crystals))
    ) as count:
        count(len(crystals) - len(waiting) - len(again))
        for evaluation in answers(workspace.evaluator, waiting) if waiting else ():
            record = evaluation_record(evaluation, number)
            workspace.store.add_evaluations([record])
            known[record.candidate_id] = record
            if computes and _is_worth_another(record):
                again[record.candidate_id] = crystals[record.candidate_id]
                continue
            _count_failure(failures, record)
            count()
        for evaluation in answers(workspace.evaluator, again) if again else ():
            record = _second(evaluation_record(evaluation, number, attempts=2), known[evaluation.id])
            workspace.store.repeat_evaluation(record)
            _count_failure(failures, record)
            count()
    return {"n": n_waiting, "failures": failures}


def _is_worth_another(record: EvaluationRecord | None) -> bool:
    return record is not None and record.failure in OF_THE_MACHINE and record.attempts == 1


def _second(record: EvaluationRecord, first: EvaluationRecord) -> EvaluationRecord:
    """The record of a second attempt with the cost of both, and what became of the first."""
    words = f"first attempt: {first.message}"
    return replace(
        record,
        cost_seconds=record.cost_seconds + first.cost_seconds,
        message=f"{record.message}; {words}" if record.message else words,
    )


def _count_failure(failures: dict[str, int], record: EvaluationRecord) -> None:
    if record.failure is not None:
        failures[record.failure] = failures.get(record.failure, 0) + 1
