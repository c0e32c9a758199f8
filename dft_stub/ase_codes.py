"""Any ASE calculator as an evaluator, with elemental references of its own.

A code is named as ASE names it (`emt`, `gpaw`, `espresso`) or by the dotted path of its calculator class, and configured with the keywords
of that class.  Its references are the lowest relaxed energies of the elements' known forms, computed the first time an element occurs
and kept in a JSON file, since they cost as much as any other calculation.
"""

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from ase.calculators.calculator import Calculator, get_calculator_class

from dft_stub.evaluator import Evaluation, Failure
from dft_stub.references import read_references, write_references
from dft_stub.relaxer import RelaxSettings, relaxation_method
from dft_stub.relaxing import RelaxingEvaluator
from dft_stub.workers import WorkerLimits
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import MAX_ATOMIC_NUMBER, SYMBOLS
from gnome.errors import EvaluatorUnavailable
from gnome.stability.method import Method
from gnome.stability.references import ElementalReferences

_EMT_ELEMENTS: Final = frozenset(SYMBOLS.index(symbol) for symbol in ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au"))


@dataclass(frozen=True, kw_only=True)
class ASEPotential:
    """An ASE calculator by name; implements `dft_stub.potentials.Potential`.

    `keywords` go to the calculator's class as they are; they are part of the method, so what changes no energy (`txt`, parallelisation)
    belongs into `silent_keywords`.  With keywords that name a functional under `xc`, it is the method's.
    """

    calculator_name: str
    keywords: Mapping[str, Any] = field(default_factory=dict)
    silent_keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Last part of the calculator's name."""
        return self.calculator_name.rsplit(".", 1)[-1].lower()

    @cached_property
    def method(self) -> Method:
        """Code, functional and keywords."""
        package = self.calculator_name.split(".", 1)[0]
        versions = {"ase": version("ase")}
        with contextlib.suppress(PackageNotFoundError):  # part of ASE, or no package of its own
            versions[package] = version(package)
        return Method(
            code=self.name,
            functional=str(self.keywords.get("xc", "default")),
            settings={"keywords": json.loads(json.dumps(dict(self.keywords), sort_keys=True, default=str))},
            versions=versions,
        )

    @property
    def elements(self) -> frozenset[int]:
        """Every element, except for EMT, which is made for seven metals."""
        return _EMT_ELEMENTS if self.name == "emt" else frozenset(range(1, MAX_ATOMIC_NUMBER + 1))

    def calculator(self) -> Calculator:
        """Make the calculator; raises EvaluatorUnavailable when its package is not installed."""
        return calculator_class(self.calculator_name)(**self.keywords, **self.silent_keywords)


def calculator_class(name: str) -> Callable[..., Calculator]:
    """Find a calculator's class by ASE's name or dotted path."""
    try:
        if "." not in name:
            return get_calculator_class(name)
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise EvaluatorUnavailable(f"calculator {name!r} cannot be loaded ({error}); is its package installed?") from None


class ASEEvaluator(RelaxingEvaluator):
    """Relaxes with any ASE calculator; elemental references are made when first needed and kept in `references_path`.

    `ground_states` gives, for each element, the known forms to relax; elements without are answered as unsupported.
    Raises EvaluatorUnavailable when the calculator is not there or the file belongs to another method.
    """

    def __init__(
        self,
        potential: ASEPotential,
        *,
        references_path: Path,
        ground_states: Mapping[int, Sequence[Crystal]],
        settings: RelaxSettings | None = None,
        workers: int | None = None,
        limits: WorkerLimits | None = None,
    ) -> None:
        calculator_class(potential.calculator_name)
        self._path = references_path
        self._ground_states = dict(ground_states)
        label = relaxation_method(potential, settings or RelaxSettings()).label
        known = read_references(references_path) if references_path.exists() else ElementalReferences(method=label, energies={})
        super().__init__(potential, known, settings=settings, workers=workers, limits=limits)

    @property
    def elements(self) -> frozenset[int]:
        """Elements that the calculator knows and that have a reference or a known form to make one from."""
        return self.potential.elements & (self._references.elements | frozenset(self._ground_states))

    def collect(self, ticket: str) -> Iterator[Evaluation]:
        """Make the references the ticket needs, then answer as every relaxing evaluator does."""
        self.prepare(frozenset(z for crystal in self._pending.get(ticket, {}).values() for z in crystal.composition))
        yield from super().collect(ticket)

    def prepare(self, elements: frozenset[int]) -> None:
        """Relax the known forms of elements that have no reference yet; keeps what it finds.

        Raises EvaluatorUnavailable naming an element of which no form could be relaxed, or one ran into a limit: the lowest might be that.
        """
        for z in sorted((elements & self.elements) - self._references.elements):
            forms = {f"{SYMBOLS[z]} {k}": crystal for k, crystal in enumerate(self._ground_states[z])}
            found = self.relax_only(forms).values()
            if unclear := [form for form in found if form.failure in {Failure.TIMEOUT, Failure.OUT_OF_MEMORY}]:
                raise EvaluatorUnavailable(
                    f"{self.name}: the reference of {SYMBOLS[z]} needs every known form, and one had no fair chance: {unclear[0].message}; "
                    "raise GNOME_EVALUATION_SECONDS or GNOME_EVALUATION_MEMORY_GB and run again"
                )
            energies = [form.energy_per_atom for form in found if form.converged and form.energy_per_atom is not None]
            if not energies:
                raise EvaluatorUnavailable(
                    f"{self.name}: no form of {SYMBOLS[z]} could be relaxed: {'; '.join(form.message for form in found)}"
                )
            known = {**self._references.energies, z: min(energies)}
            self._references = ElementalReferences(method=self.method.label, energies=known)
            write_references(self._path, self._references, self.method)
