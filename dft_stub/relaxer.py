"""Relaxation of one crystal: ASE's FIRE over positions and cell, fenced by gates on both sides.

The atoms are looked at after every step, before the potential sees them again: a potential that pulls atoms into each other or the cell
to nothing would otherwise send its own neighbour list into an endless run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from ase.stress import voigt_6_to_full_3x3_stress
from ase.units import GPa

from dft_stub.evaluator import Failure
from dft_stub.potentials import Potential
from gnome.crystals.convert import from_atoms, to_atoms
from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import DEFAULT_GATE, GateSettings, check_crystal, heights
from gnome.errors import InvalidCrystal
from gnome.stability.method import Method

CONSISTENT_ENERGY = 1e-3
"""eV/atom: how far the energy of the stored crystal may lie from the last one of the relaxation."""

_FRESH_FORCE = 1.1  # times fmax: what the largest force may be when the stored crystal is evaluated from nothing


@dataclass(frozen=True, kw_only=True)
class RelaxSettings:
    """How far and how long to relax.

    `fmax` eV/angstrom, on atoms and on the cell's virial per atom (ASE's criterion for FrechetCellFilter); `max_steps` counts FIRE steps;
    `volume_change` bounds the final over the initial volume.
    """

    fmax: float = 0.03
    max_steps: int = 400
    relax_cell: bool = True
    volume_change: tuple[float, float] = (0.2, 5.0)
    gate: GateSettings = DEFAULT_GATE

    def defining(self) -> dict[str, Any]:
        """What of it changes a converged energy, for the method's settings."""
        return {"optimizer": "ASE FIRE, FrechetCellFilter" if self.relax_cell else "ASE FIRE", "fmax": self.fmax}


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """What a relaxation ended with.

        `failure` is None exactly when it converged and passed every gate.  energy eV/atom; max_force eV/angstrom, of the stored crystal,
        computed afresh; forces (n, 3) eV/angstrom; stress (3, 3) GPa; magnetic_moments (n,) where the potential gives them.
    `cost_seconds` is told by who ran it: a process does not see what its running children use.
    """

    failure: Failure | None = None
    message: str = ""
    crystal: Crystal | None = None
    energy_per_atom: float | None = None
    max_force: float | None = None
    n_steps: int = 0
    forces: list[list[float]] | None = None
    stress: list[list[float]] | None = None
    magnetic_moments: list[float] | None = None
    cost_seconds: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """Whether there is an energy to use."""
        return self.failure is None


class _Broken(Exception):
    """The relaxation went somewhere no crystal is."""


def relax(
    crystal: Crystal,
    calculator: Calculator,
    settings: RelaxSettings | None = None,
    *,
    elements: frozenset[int] | None = None,
) -> Relaxation:
    """Relax one crystal; whatever goes wrong becomes a `failure`, only interrupts are raised.

    `elements` are the atomic numbers the calculator was made for; any when None.
    """
    settings = settings or RelaxSettings()
    try:
        check_crystal(crystal, settings.gate, elements=elements)
    except InvalidCrystal as error:
        failure = Failure.UNSUPPORTED_ELEMENT if error.reason == "unsupported_element" else Failure.REFUSED
        return Relaxation(failure=failure, message=str(error))
    try:
        outcome = _relax(crystal, calculator, settings)
    except (_Broken, InvalidCrystal) as error:
        outcome = {"failure": Failure.IMPLAUSIBLE, "message": f"{crystal.reduced_formula}: {error}"}
    except MemoryError as error:
        outcome = {"failure": Failure.OUT_OF_MEMORY, "message": f"{crystal.reduced_formula}: out of memory ({error})"}
    except Exception as error:  # a potential's fault is a record, whatever it raised
        first_line = (str(error).splitlines() or [""])[0][:300]
        outcome = {"failure": Failure.CRASHED, "message": f"{crystal.reduced_formula}: {type(error).__name__}: {first_line}"}
    return Relaxation(**outcome)


def _relax(crystal: Crystal, calculator: Calculator, settings: RelaxSettings) -> dict[str, Any]:
    """Descend until the crystal as it is stored is converged too.

    The filter measures the cell's forces against the cell it started from, so after a large strain they read differently when the
    crystal is taken up afresh; then the descent starts again from there, within the same number of steps.
    """
    current, n_steps = crystal, 0
    while True:
        atoms = to_atoms(current)
        atoms.calc = calculator
        _forget(calculator)
        steps, force, energy = _descend(atoms, settings, max_steps=settings.max_steps - n_steps, start=crystal.volume_per_atom)
        n_steps += steps
        current = from_atoms(atoms)
        if force >= settings.fmax:
            message = f"{crystal.reduced_formula}: largest force {force:.3f} eV/angstrom after {n_steps} steps"
            return {
                "failure": Failure.NOT_CONVERGED,
                "message": message,
                "crystal": current,
                "n_steps": n_steps,
                "max_force": force,
            }
        check_crystal(current, settings.gate)
        measured = _measure(current, calculator, settings, expected_energy=energy)
        if measured["max_force"] < _FRESH_FORCE * settings.fmax:
            return {"n_steps": n_steps, **measured}
        if steps == 0:
            raise _Broken(f"largest force {force:.3f}, evaluated again {measured['max_force']:.3f} eV/angstrom")


def _descend(atoms: Atoms, settings: RelaxSettings, *, max_steps: int, start: float) -> tuple[int, float, float]:
    """Step until the largest force is below fmax or the steps are spent; returns steps, largest force and energy per atom.

    `start` is the volume per atom that the whole relaxation began with.
    """
    target = FrechetCellFilter(atoms) if settings.relax_cell else atoms
    optimizer = FIRE(target, logfile=None)
    n_steps = 0
    while True:
        force = float(np.linalg.norm(target.get_forces(), axis=1).max())
        energy = float(atoms.get_potential_energy()) / len(atoms)
        if not (np.isfinite(force) and np.isfinite(energy)):
            raise _Broken(f"energy or forces are not finite after {n_steps} steps")
        if force < settings.fmax or n_steps >= max_steps:
            return n_steps, force, energy
        optimizer.step()
        n_steps += 1
        _check_atoms(atoms, settings, start, n_steps)


def _check_atoms(atoms: Atoms, settings: RelaxSettings, start: float, n_steps: int) -> None:
    cell = np.asarray(atoms.cell)
    if not (np.isfinite(cell).all() and np.isfinite(atoms.positions).all()):
        raise _Broken(f"positions or cell are not finite after {n_steps} steps")
    volume = abs(float(np.linalg.det(cell))) / len(atoms)
    smallest, largest = settings.volume_change
    if not smallest <= volume / start <= largest:
        raise _Broken(f"volume went from {start:.2f} to {volume:.2f} angstrom^3 per atom in {n_steps} steps")
    gate = settings.gate
    height = heights(cell)
    if not gate.min_volume_per_atom / 2 <= volume <= gate.max_volume_per_atom * 2 or height.min() < gate.min_height / 2:
        raise _Broken(f"the cell left the range of crystals after {n_steps} steps")


def _measure(crystal: Crystal, calculator: Calculator, settings: RelaxSettings, *, expected_energy: float) -> dict[str, Any]:
    """Evaluate the crystal as it is stored, from nothing, and hold its energy against the relaxation's last step."""
    atoms = to_atoms(crystal)
    _forget(calculator)
    atoms.calc = calculator
    energy = float(atoms.get_potential_energy()) / len(atoms)
    target = FrechetCellFilter(atoms) if settings.relax_cell else atoms
    force = float(np.linalg.norm(target.get_forces(), axis=1).max())
    if not (abs(energy - expected_energy) < CONSISTENT_ENERGY and np.isfinite(force)):
        raise _Broken(
            f"evaluated again: {energy:.4f} eV/atom, {force:.3f} eV/angstrom; relaxation ended at {expected_energy:.4f}"
        )
    moments = getattr(calculator, "results", {}).get("magmoms")
    stress = voigt_6_to_full_3x3_stress(atoms.get_stress()) / GPa if settings.relax_cell else None
    return {
        "crystal": crystal,
        "energy_per_atom": energy,
        "max_force": force,
        "forces": np.asarray(atoms.get_forces(), dtype=float).tolist(),
        "stress": None if stress is None else stress.tolist(),
        "magnetic_moments": None if moments is None else np.asarray(moments, dtype=float).ravel().tolist(),
    }


def _forget(calculator: Calculator) -> None:
    """Drop results of earlier crystals; GPAW's calculator has no such method and keeps none for other atoms."""
    if hasattr(calculator, "reset"):
        calculator.reset()


def relaxation_method(potential: Potential, settings: RelaxSettings) -> Method:
    """Label of energies that come from relaxing with a potential under these settings."""
    return replace(potential.method, settings={**potential.method.settings, **settings.defining()})
