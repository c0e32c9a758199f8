"""An evaluator from a potential: relaxation in worker processes, formation energies from the potential's own references."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from dft_stub.evaluator import Evaluation, Failure
from dft_stub.potentials import Potential
from dft_stub.relaxer import Relaxation, RelaxSettings, relax, relaxation_method
from dft_stub.workers import TaskOutcome, WorkerLimits, WorkerPool
from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import GateSettings, check_crystal
from gnome.errors import EvaluatorUnavailable, InvalidCrystal
from gnome.processes import usable_cores
from gnome.stability.method import Method
from gnome.stability.references import ElementalReferences

_BARE = "="  # stands where a task has no ticket


class RelaxingEvaluator:
    """Relaxes crystals with a potential; implements `dft_stub.evaluator.Evaluator`.

    `references` are energies of the elements under the same method.  `collect` waits until everything handed in under its ticket is
    answered, yielding answers as they come; their order depends on the machine, their content does not.
    Raises EvaluatorUnavailable when the references belong to another method.
    """

    def __init__(
        self,
        potential: Potential,
        references: ElementalReferences,
        *,
        settings: RelaxSettings | None = None,
        workers: int | None = None,
        limits: WorkerLimits | None = None,
    ) -> None:
        self.settings = settings or RelaxSettings()
        self.potential = potential
        self._method = relaxation_method(potential, self.settings)
        self._references = references
        self._check_references()
        self._pool = WorkerPool(
            functools.partial(_make_relaxation, potential, self.settings),
            workers=usable_cores() if workers is None else workers,
            limits=limits or WorkerLimits(),
        )
        self._tickets = itertools.count(1)
        self._pending: dict[str, dict[str, Crystal]] = {}
        self._answered: dict[str, list[Evaluation | TaskOutcome]] = {}
        self._bare: dict[str, TaskOutcome] = {}

    @property
    def name(self) -> str:
        """Name of the potential."""
        return self.potential.name

    @property
    def method(self) -> Method:
        """The potential's method with the relaxation's settings."""
        return self._method

    @property
    def references(self) -> ElementalReferences:
        """What formation energies are taken from."""
        return self._references

    @property
    def elements(self) -> frozenset[int]:
        """Elements that the potential knows and that have a reference."""
        return self.potential.elements & self._references.elements

    @property
    def gate(self) -> GateSettings:
        """That of the relaxation."""
        return self.settings.gate

    @property
    def computes(self) -> bool:
        """Yes."""
        return True

    def submit(self, crystals: Mapping[str, Crystal]) -> str:
        """Queue crystals; those no potential may be given are answered without one."""
        ticket = f"{self.name}-{next(self._tickets)}"
        self._pending[ticket], self._answered[ticket] = dict(crystals), []
        for name, crystal in crystals.items():
            try:
                check_crystal(crystal, self.settings.gate, elements=self.elements)
            except InvalidCrystal as error:
                failure = Failure.UNSUPPORTED_ELEMENT if error.reason == "unsupported_element" else Failure.REFUSED
                self._answered[ticket].append(self._failed(name, failure, str(error)))
            else:
                self._pool.submit(f"{ticket}\n{name}", crystal)
        return ticket

    def collect(self, ticket: str) -> Iterator[Evaluation]:
        """Yield the answers to a ticket, each once, waiting for those still under way."""
        if ticket not in self._pending:
            raise EvaluatorUnavailable(f"no ticket {ticket!r} is open with {self.name}")
        outcomes = self._pool.outcomes()
        while self._pending[ticket]:
            while self._answered[ticket]:
                answer = self._answered[ticket].pop(0)
                evaluation = answer if isinstance(answer, Evaluation) else self._evaluation(answer)
                del self._pending[ticket][evaluation.id]
                yield evaluation
            if not self._pending[ticket]:
                return
            if (outcome := next(outcomes, None)) is not None:
                self._sort_in(outcome)
            else:  # an interrupt fell between an answer and its arrival here: ask again
                for name, crystal in self._pending[ticket].items():
                    self._pool.submit(f"{ticket}\n{name}", crystal)
                outcomes = self._pool.outcomes()

    def pending(self, ticket: str) -> frozenset[str]:
        """Ids not collected yet."""
        return frozenset(self._pending.get(ticket, ()))

    def close(self) -> None:
        """End the worker processes; a later `collect` starts them again."""
        self._pool.close()

    def _check_references(self) -> None:
        if self._references.method != self._method.label:
            raise EvaluatorUnavailable(
                f"the elemental references belong to method {self._references.method}, not {self._method.label}; make them anew"
            )

    def relax_only(self, crystals: Mapping[str, Crystal]) -> dict[str, Relaxation]:
        """Relax crystals for their energies alone; waits for all."""
        for name, crystal in crystals.items():
            self._pool.submit(f"{_BARE}\n{name}", crystal)
        outcomes = self._pool.outcomes()
        while not crystals.keys() <= self._bare.keys():
            self._sort_in(next(outcomes))
        taken = {name: self._bare.pop(name) for name in crystals}
        return {name: _relaxation(outcome) for name, outcome in taken.items()}

    def _sort_in(self, outcome: TaskOutcome) -> None:
        ticket, name = outcome.task.split("\n", 1)
        if ticket == _BARE:
            self._bare[name] = outcome
        else:
            self._answered[ticket].append(outcome)

    def _failed(self, name: str, failure: Failure, message: str, *, cost_seconds: float = 0.0) -> Evaluation:
        return Evaluation(
            id=name, method=self.method, converged=False, failure=failure, message=message, cost_seconds=cost_seconds
        )

    def _evaluation(self, outcome: TaskOutcome) -> Evaluation:
        """Turn a relaxation into an answer; done when it is collected, since references may come after it."""
        ticket, name = outcome.task.split("\n", 1)
        if outcome.failure is not None:
            message = f"{self._pending[ticket][name].reduced_formula}: {outcome.message}"
            return self._failed(name, outcome.failure, message, cost_seconds=outcome.seconds)
        relaxation: Relaxation = outcome.result
        e_form = None
        if relaxation.crystal is not None and relaxation.energy_per_atom is not None and relaxation.failure is None:
            e_form = self._references.formation_energy_per_atom(relaxation.crystal.composition, relaxation.energy_per_atom)
        return Evaluation(
            id=name,
            method=self.method,
            converged=relaxation.failure is None,
            crystal=relaxation.crystal,
            energy_per_atom=relaxation.energy_per_atom,
            e_form_per_atom=e_form,
            max_force=relaxation.max_force,
            n_steps=relaxation.n_steps,
            forces=relaxation.forces,
            stress=relaxation.stress,
            magnetic_moments=relaxation.magnetic_moments,
            failure=relaxation.failure,
            message=relaxation.message,
            cost_seconds=outcome.seconds,
        )


def _relaxation(outcome: TaskOutcome) -> Relaxation:
    if outcome.failure is None:
        relaxation: Relaxation = outcome.result
        return replace(relaxation, cost_seconds=outcome.seconds)
    return Relaxation(failure=outcome.failure, message=outcome.message, cost_seconds=outcome.seconds)


def _make_relaxation(potential: Potential, settings: RelaxSettings) -> Callable[[Crystal], Relaxation]:
    """Load the potential in a worker; a function of the crystal alone."""
    calculator = potential.calculator()
    return functools.partial(relax, calculator=calculator, settings=settings, elements=potential.elements)
