"""Handing crystals to an evaluator and storing every answer as it comes."""

from collections.abc import Iterator, Mapping
from typing import Any

from dft_stub.evaluator import Evaluation, Evaluator
from flows.records import evaluation_record
from flows.workspace import Workspace
from gnome.crystals.crystal import Crystal
from gnome.errors import EvaluatorUnavailable


def answers(evaluator: Evaluator, crystals: Mapping[str, Crystal]) -> Iterator[Evaluation]:
    """Hand crystals in and yield every answer as it comes.

    Raises EvaluatorUnavailable at the end when some have no answer yet: what is asked again later is answered then.
    """
    ticket = evaluator.submit(crystals)
    yield from evaluator.collect(ticket)
    if waiting := evaluator.pending(ticket):
        raise EvaluatorUnavailable(
            f"{len(waiting)} of {len(crystals)} evaluations by {evaluator.name} have no answer yet; "
            "give the same command again when they have"
        )


def evaluate_crystals(workspace: Workspace, number: int, crystals: Mapping[str, Crystal]) -> dict[str, Any]:
    """Evaluate what has no answer yet; an interruption loses nothing that was answered."""
    answered = {record.candidate_id for record in workspace.store.evaluations_of_round(number)}
    waiting = {identifier: crystal for identifier, crystal in crystals.items() if identifier not in answered}
    failures: dict[str, int] = {}
    with workspace.listener.stage("evaluating", len(crystals), "crystals") as count:
        count(len(crystals) - len(waiting))
        for evaluation in answers(workspace.evaluator, waiting):
            workspace.store.add_evaluations([evaluation_record(evaluation, number)])
            if evaluation.failure is not None:
                failures[str(evaluation.failure)] = failures.get(str(evaluation.failure), 0) + 1
            count()
    return {"n": len(waiting), "failures": failures}
