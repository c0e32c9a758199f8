"""The contract of an evaluator, and the record it answers with.

    ticket = evaluator.submit({"id-1": crystal, ...})
    for evaluation in evaluator.collect(ticket): ...      # what has been answered since the last call
    evaluator.pending(ticket)                             # ids still under way
    evaluator.close()                                     # when nothing more is to be asked

An answer may come at once, in minutes from worker processes, or tomorrow from a cluster; the caller only sees fewer pending ids.
A failure is a record with a typed reason, never an exception and never a missing row.  Whoever stores answers lets
`dft_stub.admission.admit` look at them first, under the evaluator's `gate`.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import GateSettings
from gnome.quantities import PLAUSIBLE_E_FORM
from gnome.stability.method import Method


class Failure(StrEnum):
    """Why an evaluation has no usable energy."""

    REFUSED = "refused"  # the crystal failed a gate before anything ran
    UNSUPPORTED_ELEMENT = "unsupported_element"  # the method was not made for an element, or has no reference for it
    NOT_CONVERGED = "not_converged"  # forces above the threshold when the step limit was reached
    IMPLAUSIBLE = "implausible"  # not finite, outside the plausible range, or broken geometry after relaxation
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED = "crashed"
    NO_ANSWER = "no_answer"  # a recorded evaluator without this crystal, a lost job


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluator found for one crystal.

    Energies are eV/atom: `energy_per_atom` raw, `correction_per_atom` what the method's scheme adds, `e_form_per_atom` from the
    method's own elemental references.  `crystal` is the relaxed one; forces (n, 3) eV/angstrom, stress (3, 3) GPa and magnetic moments
    (n,) are kept where the method gives them.  `cost_seconds` is processor time, that of programs it started included.
    `failure` is None exactly when `converged`; then crystal, energy_per_atom and e_form_per_atom are set.
    """

    id: str
    method: Method
    converged: bool
    crystal: Crystal | None = None
    energy_per_atom: float | None = None
    correction_per_atom: float = 0.0
    e_form_per_atom: float | None = None
    max_force: float | None = None
    n_steps: int = 0
    forces: list[list[float]] | None = None
    stress: list[list[float]] | None = None
    magnetic_moments: list[float] | None = None
    failure: Failure | None = None
    message: str = ""
    cost_seconds: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)


class Evaluator(Protocol):
    """Relaxes crystals and answers with evaluations; see the module for the contract."""

    @property
    def name(self) -> str:
        """Name on the command line."""
        ...

    @property
    def method(self) -> Method:
        """What labels every energy this evaluator gives."""
        ...

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it can answer for (it has a reference for each)."""
        ...

    @property
    def gate(self) -> GateSettings:
        """What a relaxed crystal has to pass."""
        ...

    @property
    def computes(self) -> bool:
        """Whether to ask again is to compute again, so that what failed for want of time may go well; false for what is looked up."""
        ...

    def submit(self, crystals: Mapping[str, Crystal]) -> str:
        """Hand crystals in under their ids; returns a ticket at once."""
        ...

    def collect(self, ticket: str) -> Iterator[Evaluation]:
        """Yield evaluations as they come, each once; returns when nothing more is to be had at present."""
        ...

    def pending(self, ticket: str) -> frozenset[str]:
        """Ids handed in under the ticket and not collected yet."""
        ...

    def close(self) -> None:
        """End what it has started; it may be called twice, and what is pending stays so."""
        ...


def validate_evaluator(evaluator: Evaluator, crystals: Iterable[Crystal], *, energy_tolerance: float = 1e-6) -> None:
    """Check an implementation against the contract; every implementation's test calls this.

    Needs at least two crystals that the evaluator can answer at once.  `energy_tolerance` eV/atom bounds how far repeated answers differ.
    Raises AssertionError naming the clause that is broken.
    """
    asked = {f"crystal-{number}": crystal for number, crystal in enumerate(crystals)}
    if len(asked) < 2:
        raise AssertionError("validate_evaluator needs at least two crystals")
    before = {name: json.dumps(crystal.to_dict()) for name, crystal in asked.items()}
    batch = _answers(evaluator, asked)
    for name, evaluation in batch.items():
        _check_evaluation(evaluator, evaluation, asked[name])
    _require(any(evaluation.converged for evaluation in batch.values()), "at least one crystal is answered with an energy")
    _require(before == {name: json.dumps(crystal.to_dict()) for name, crystal in asked.items()}, "inputs are left unchanged")
    for name, crystal in reversed(asked.items()):
        single = _answers(evaluator, {name: crystal})[name]
        _check_same(batch[name], single, energy_tolerance, "a batch answers as its crystals one by one, and again the same")
    _require(not _answers(evaluator, {}), "nothing asked is nothing answered")
    _require(isinstance(evaluator.gate, GateSettings), "it says what a relaxed crystal has to pass")
    _require(isinstance(evaluator.computes, bool), "it says whether it computes")
    waiting = evaluator.submit(asked)
    evaluator.close()
    evaluator.close()
    _require(evaluator.pending(waiting) == frozenset(asked), "what is pending stays so when it is closed")
    after = {evaluation.id: evaluation for evaluation in evaluator.collect(waiting)}
    _require(after.keys() == asked.keys(), "what was pending when it was closed is answered later")
    for name, evaluation in after.items():
        _check_same(batch[name], evaluation, energy_tolerance, "to close it changes no answer")
    evaluator.close()


def _answers(evaluator: Evaluator, crystals: Mapping[str, Crystal]) -> dict[str, Evaluation]:
    ticket = evaluator.submit(crystals)
    _require(evaluator.pending(ticket) == frozenset(crystals), "everything handed in is pending until collected")
    answers: dict[str, Evaluation] = {}
    for evaluation in evaluator.collect(ticket):
        _require(evaluation.id in crystals, f"only ids that were handed in are answered, got {evaluation.id!r}")
        _require(evaluation.id not in answers, f"every id is answered once, {evaluation.id!r} came twice")
        _require(evaluation.id not in evaluator.pending(ticket), f"what was collected is no longer pending, {evaluation.id!r} is")
        answers[evaluation.id] = evaluation
    _require(answers.keys() == crystals.keys(), f"every id is answered, missing {sorted(crystals.keys() - answers.keys())}")
    _require(not list(evaluator.collect(ticket)), "nothing is answered again")
    return answers


def _check_evaluation(evaluator: Evaluator, evaluation: Evaluation, crystal: Crystal) -> None:
    name = evaluation.id
    _require(evaluation.method.label == evaluator.method.label, f"{name} carries the evaluator's method")
    _require(evaluation.converged == (evaluation.failure is None), f"{name} has a failure exactly when it did not converge")
    _require(evaluation.cost_seconds >= 0, f"{name} has a cost of at least nothing")
    if evaluation.failure is not None:
        _require(isinstance(evaluation.failure, Failure) and bool(evaluation.message), f"{name} fails with a type and a message")
        return
    relaxed, energy, e_form = evaluation.crystal, evaluation.energy_per_atom, evaluation.e_form_per_atom
    if relaxed is None or energy is None or e_form is None:
        raise AssertionError(f"contract of evaluators: {name} converged with crystal, energy_per_atom and e_form_per_atom")
    _require(relaxed.composition == crystal.composition, f"{name} keeps its atoms")
    _require(set(crystal.composition) <= evaluator.elements, f"{name} has only elements the evaluator names")
    _require(
        math.isfinite(energy) and PLAUSIBLE_E_FORM[0] <= e_form <= PLAUSIBLE_E_FORM[1],
        f"{name} has plausible energies in eV/atom",
    )
    references = getattr(evaluator, "references", None)
    if references is not None:
        expected = references.formation_energy_per_atom(crystal.composition, energy, evaluation.correction_per_atom)
        _require(abs(e_form - expected) < 1e-9, f"{name}: e_form_per_atom is energy plus correction minus the elements")


def _check_same(first: Evaluation, second: Evaluation, tolerance: float, clause: str) -> None:
    _require(first.failure == second.failure, f"{clause}: {first.id} gave {first.failure} and {second.failure}")
    if first.energy_per_atom is not None and second.energy_per_atom is not None:
        _require(abs(first.energy_per_atom - second.energy_per_atom) <= tolerance, f"{clause}: energies of {first.id} differ")


def _require(holds: bool, clause: str) -> None:  # reads as a sentence
    if not holds:
        raise AssertionError(f"contract of evaluators: {clause}")
