"""The contract of an evaluator, and the record it answers with.

    ticket = evaluator.submit({"id-1": crystal, ...})
    for evaluation in evaluator.collect(ticket): ...      # what has been answered since the last call
    evaluator.pending(ticket)                             # ids still under way

An answer may come at once, in minutes from worker processes, or tomorrow from a cluster; the caller only sees fewer pending ids.
A failure is a record with a typed reason, never an exception and never a missing row.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from gnome.crystals.crystal import Crystal
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
    (n,) are kept where the method gives them.  `cost_seconds` is processor time.
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

    def submit(self, crystals: Mapping[str, Crystal]) -> str:
        """Hand crystals in under their ids; returns a ticket at once."""
        ...

    def collect(self, ticket: str) -> Iterator[Evaluation]:
        """Yield evaluations as they come, each once; returns when nothing more is to be had at present."""
        ...

    def pending(self, ticket: str) -> frozenset[str]:
        """Ids handed in under the ticket and not collected yet."""
        ...


def validate_evaluator(evaluator: Evaluator, crystals: Iterable[Crystal]) -> None:
    """Check an implementation against the contract; every implementation's test calls this.

    Raises AssertionError naming the clause that is broken.
    """
    raise NotImplementedError
