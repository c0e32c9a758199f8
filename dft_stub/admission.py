"""What of an evaluator's answers may be stored: the one gate between whoever computes and the database.

Whatever an evaluator answers, what `admit` returns can be stored: numbers are Python's own and within the tables' ranges, lists are lists,
texts can be encoded.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, SupportsFloat

import numpy as np

from dft_stub.evaluator import Evaluation, Failure
from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import DEFAULT_GATE, GateSettings, check_crystal
from gnome.errors import InvalidCrystal
from gnome.quantities import PLAUSIBLE_E_FORM
from gnome.stability.method import Method

MAX_RAW_ENERGY: Final = 100_000.0
"""eV/atom: what no code gives as the energy of a crystal; see `gnome.database.schema`."""
MAX_COST_SECONDS: Final = 1e10
"""Three hundred years; see there too."""
MAX_STEPS: Final = 1_000_000_000
MAX_MESSAGE: Final = 2_000
"""Characters of a message that are kept."""

_OF_ENERGIES = (-MAX_RAW_ENERGY, MAX_RAW_ENERGY)
_OF_REST = (-1e12, 1e12)
"""Forces, stress and moments: what is beyond comes from no calculation."""


class _Bad(Exception):
    """A field holds what cannot be; the message names the value."""


def admit(answer: Evaluation, asked: Crystal, method: Method, *, gate: GateSettings = DEFAULT_GATE) -> Evaluation:
    """Return a converged answer if it can be true, otherwise the failure that it is; of a failure, what can be stored.

    It must be of the method, hold a crystal of the formula asked for that passes the geometric gate, and plausible numbers.  What a failure
    holds that cannot be stored is left out, and its message says so.
    """
    fields, wrong = _plain_fields(answer, asked)
    label = _label(answer.method)
    if label != method.label:
        return _refused(answer, asked, f"the answer is of method {label}, not {method.label}", fields, method)
    kept = answer.method if _is_json(answer.method) else method
    failure, reason = _failure_of(answer)
    if failure is None:
        found = _what_is_wrong(answer, asked, gate) or next(iter(wrong), None)
        if found is not None:
            return _refused(answer, asked, found, fields, kept)
    else:
        said = "; ".join(words for words in (fields["message"], reason) if words) or str(failure)
        fields["message"] = f"{said} (not kept: {'; '.join(wrong)})" if wrong else said
    return replace(answer, method=kept, converged=failure is None, failure=failure, **fields)


def _plain_fields(answer: Evaluation, asked: Crystal) -> tuple[dict[str, Any], list[str]]:
    """The fields of an answer as the database takes them, and what was wrong with the others."""
    crystal = answer.crystal if isinstance(answer.crystal, Crystal) else None
    n_atoms = (crystal or asked).n_atoms
    readers: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "crystal": (_finite_crystal, None),
        "energy_per_atom": (lambda value: _number(value, _OF_ENERGIES, " eV/atom"), None),
        "correction_per_atom": (lambda value: _number(value, _OF_ENERGIES, " eV/atom"), 0.0),
        "e_form_per_atom": (lambda value: _number(value, PLAUSIBLE_E_FORM, " eV/atom"), None),
        "max_force": (lambda value: _number(value, (0.0, _OF_REST[1]), " eV/angstrom"), None),
        "n_steps": (_count, 0),
        "cost_seconds": (lambda value: _number(value, (0.0, MAX_COST_SECONDS), ""), 0.0),
        "forces": (lambda value: _array(value, (n_atoms, 3)), None),
        "stress": (lambda value: _array(value, (3, 3)), None),
        "magnetic_moments": (lambda value: _array(value, (n_atoms,)), None),
    }
    fields: dict[str, Any] = {"message": _text(answer.message)}
    wrong: list[str] = []
    for name, (read, instead) in readers.items():
        value = getattr(answer, name)
        fields[name] = instead
        if value is None and instead is None:
            continue
        try:
            fields[name] = read(value)
        except _Bad as problem:
            wrong.append(f"{name} is {problem}")
    return fields, wrong


def _number(value: object, limits: tuple[float, float], unit: str) -> float:
    low, high = limits
    if not isinstance(value, SupportsFloat) or isinstance(value, np.complexfloating):  # which would lose a part
        raise _Bad(_shown(value))
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # many numbers, or too large
        raise _Bad(_shown(value)) from None
    if not low <= number <= high:
        raise _Bad(f"{number}{unit}, expected {low:g} to {high:g}")
    return number


def _count(value: Any) -> int:
    number = _number(value, (0, MAX_STEPS), "")
    if number != int(number):
        raise _Bad(f"{number}, expected a whole number")
    return int(number)


def _array(value: Any, shape: tuple[int, ...]) -> Any:
    try:
        array = np.asarray(value)
        if np.iscomplexobj(array):
            raise _Bad(f"{_shown(value)}, expected real numbers")
        array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # ragged, no numbers, or on another device
        raise _Bad(f"{_shown(value)}, expected numbers of shape {shape}") from None
    if array.shape != shape:
        raise _Bad(f"of shape {array.shape}, expected {shape}")
    if (bad := array[~(np.abs(array) <= _OF_REST[1])]).size:
        raise _Bad(f"{bad[0]} in {bad.size} of {array.size} places")
    return array.tolist()


def _finite_crystal(value: Any) -> Crystal:
    if not isinstance(value, Crystal):
        raise _Bad(f"{_shown(value)}, expected a Crystal")
    if not (np.isfinite(value.lattice).all() and np.isfinite(value.frac_coords).all()):
        raise _Bad("not made of finite numbers")
    return value


def _text(value: Any) -> str:
    """A text that every database can hold: no half characters, no null."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    text = text.encode("utf-8", "replace").decode().replace("\x00", "")
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ..."


def _shown(value: Any) -> str:
    return _text(" ".join(repr(value).split())[:80])


def _label(method: Any) -> str:
    try:
        return method.label if isinstance(method, Method) else _shown(method)
    except (TypeError, ValueError):  # settings that are no JSON
        return _shown(method)


def _is_json(method: Method) -> bool:
    """Whether the method's record can be stored, its versions included, which its label says nothing of."""
    try:
        text = json.dumps(method.to_dict(), allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError):
        return False
    return "\\u0000" not in text


def _failure_of(answer: Evaluation) -> tuple[Failure | None, str]:
    """The failure of an answer, None where it converged, and what is wrong with how that is said."""
    if answer.failure is None:
        return (None, "") if answer.converged else (Failure.IMPLAUSIBLE, "neither converged nor with a failure")
    try:
        failure = Failure(answer.failure)
    except ValueError:
        return Failure.IMPLAUSIBLE, f"failure is {_shown(answer.failure)}"
    return failure, "with a failure and said to have converged" if answer.converged else ""


def _what_is_wrong(answer: Evaluation, asked: Crystal, gate: GateSettings) -> str | None:
    """What keeps a converged answer from being true, but for fields that cannot be stored."""
    crystal: Any = answer.crystal
    if crystal is None or answer.energy_per_atom is None or answer.e_form_per_atom is None:
        return "converged without a crystal, energy_per_atom or e_form_per_atom"
    if not isinstance(crystal, Crystal):  # said with the other fields
        return None
    if crystal.reduced_formula != asked.reduced_formula:
        return f"the answer is for {crystal.reduced_formula}"
    try:
        check_crystal(crystal, gate)
    except InvalidCrystal as error:
        return f"the relaxed crystal is none ({error})"
    return None


def _refused(answer: Evaluation, asked: Crystal, wrong: str, fields: Mapping[str, Any], method: Method) -> Evaluation:
    nothing = {"crystal": None, "energy_per_atom": None, "e_form_per_atom": None, "forces": None, "stress": None}
    return replace(
        answer,
        method=method,
        converged=False,
        failure=Failure.IMPLAUSIBLE,
        **{**fields, **nothing, "magnetic_moments": None, "message": f"{asked.reduced_formula}: {wrong}"},
    )
