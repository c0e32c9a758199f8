"""What of an evaluator's answers may be stored: the one gate between whoever computes and the database."""

import math
from dataclasses import replace

from dft_stub.evaluator import Evaluation, Failure
from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import DEFAULT_GATE, GateSettings, check_crystal
from gnome.errors import InvalidCrystal
from gnome.quantities import PLAUSIBLE_E_FORM
from gnome.stability.method import Method

MAX_RAW_ENERGY = 100_000.0
"""eV/atom: what no code gives as the energy of a crystal; see `gnome.database.schema`."""


def admit(answer: Evaluation, asked: Crystal, method: Method, *, gate: GateSettings = DEFAULT_GATE) -> Evaluation:
    """Return a converged answer if it can be true, otherwise the failure that it is.

    It must be of the method, hold a crystal of the formula asked for that passes the geometric gate, and plausible energies.  Failures pass
    as they are.
    """
    if answer.method.label != method.label:
        return _refused(answer, asked, f"the answer is of method {answer.method.label}, not {method.label}", method=method)
    if not answer.converged:
        return answer
    wrong = _what_is_wrong(answer, asked, gate)
    return answer if wrong is None else _refused(answer, asked, wrong, method=answer.method)


def _what_is_wrong(answer: Evaluation, asked: Crystal, gate: GateSettings) -> str | None:
    if answer.crystal is None or answer.energy_per_atom is None or answer.e_form_per_atom is None:
        return "converged without a crystal, energy_per_atom or e_form_per_atom"
    if answer.crystal.reduced_formula != asked.reduced_formula:
        return f"the answer is for {answer.crystal.reduced_formula}"
    try:
        check_crystal(answer.crystal, gate)
    except InvalidCrystal as error:
        return f"the relaxed crystal is none ({error})"
    low, high = PLAUSIBLE_E_FORM
    if not low <= answer.e_form_per_atom <= high:
        return f"formation energy {answer.e_form_per_atom:.3f} eV/atom, expected {low:g} to {high:g}"
    for name in ("energy_per_atom", "correction_per_atom"):
        value = getattr(answer, name)
        if not abs(value) <= MAX_RAW_ENERGY:
            return f"{name} is {value} eV/atom"
    if not 0 <= answer.cost_seconds < math.inf:
        return f"cost_seconds is {answer.cost_seconds}"
    return None


def _refused(answer: Evaluation, asked: Crystal, wrong: str, *, method: Method) -> Evaluation:
    cost = answer.cost_seconds if 0 <= answer.cost_seconds < math.inf else 0.0
    return replace(
        answer,
        method=method,
        converged=False,
        failure=Failure.IMPLAUSIBLE,
        message=f"{asked.reduced_formula}: {wrong}",
        crystal=None,
        energy_per_atom=None,
        e_form_per_atom=None,
        cost_seconds=cost,
    )
