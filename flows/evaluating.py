"""Handing crystals to an evaluator and storing every answer as it comes."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Final

from dft_stub.evaluator import Evaluation, Evaluator, Failure
from flows.records import evaluation_record
from flows.rounds import chosen
from flows.workspace import Workspace
from gnome.crystals.crystal import Crystal
from gnome.errors import EvaluatorUnavailable

OF_THE_MACHINE: Final = frozenset({Failure.TIMEOUT, Failure.CRASHED, Failure.OUT_OF_MEMORY})


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


def _later(evaluator: Evaluator, crystals: Mapping[str, Crystal]) -> Iterator[Evaluation]:
    """Evaluate what is in the mapping by the time this is asked for the first answer."""
    if crystals:
        yield from answers(evaluator, crystals)


def evaluate_crystals(workspace: Workspace, number: int, crystals: Mapping[str, Crystal]) -> dict[str, Any]:
    """Evaluate what has no answer yet; an interruption loses nothing that was answered.

    What failed in a way that may be the machine's doing is tried once more before it counts.
    """
    answered = {record.candidate_id for record in workspace.store.evaluations_of_round(number)}
    waiting = {identifier: crystal for identifier, crystal in crystals.items() if identifier not in answered}
    failures: dict[str, int] = {}
    again: dict[str, Crystal] = {}
    every = chosen(workspace, number)
    before = min((every.index(identifier) for identifier in crystals if identifier in every), default=0)
    with workspace.listener.stage(
        "evaluating", len(crystals), "crystals", before=before, whole=max(len(every), before + len(crystals))
    ) as count:
        count(len(crystals) - len(waiting))
        for evaluation in chain(answers(workspace.evaluator, waiting), _later(workspace.evaluator, again)):
            if evaluation.failure in OF_THE_MACHINE and evaluation.id not in again:
                again[evaluation.id] = crystals[evaluation.id]
                continue
            workspace.store.add_evaluations([evaluation_record(evaluation, number)])
            if evaluation.failure is not None:
                failures[str(evaluation.failure)] = failures.get(str(evaluation.failure), 0) + 1
            count()
    return {"n": len(waiting), "failures": failures}
