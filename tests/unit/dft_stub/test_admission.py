"""What evaluators answer is admitted or turned into the failure that it is."""

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dft_stub.admission import MAX_RAW_ENERGY, admit
from dft_stub.evaluator import Evaluation, Failure
from flows.records import evaluation_record
from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import GateSettings
from gnome.stability.method import Method

METHOD = Method(code="here", functional="f")
ASKED = Crystal.from_symbols(2.9 * np.eye(3), ["Cu", "Zn"], [[0, 0, 0], [0.5, 0.5, 0.5]])
RELAXED = ASKED.scaled(1.02)


def answer(**changes: Any) -> Evaluation:
    good: dict[str, Any] = {
        "id": "a", "method": METHOD, "converged": True, "crystal": RELAXED, "energy_per_atom": -3.5, "e_form_per_atom": -0.1,
        "correction_per_atom": 0.2, "cost_seconds": 2.5, "n_steps": 7,
    }  # fmt: skip
    return Evaluation(**{**good, **changes})


def moved(second: list[float], symbols: tuple[str, str] = ("Cu", "Zn"), factor: float = 1.0) -> Crystal:
    return Crystal.from_symbols(2.9 * np.eye(3), list(symbols), [[0, 0, 0], second]).scaled(factor)


NAN_COORDINATE = Crystal(2.9 * np.eye(3), np.array([29, 30]), np.array([[0, 0, 0], [0.5, np.nan, 0.5]]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": Method(code="there", functional="f")}, "the answer is of method there"),
        ({"crystal": moved([0.5, 0.5, 0.5], ("Cu", "Ni"))}, "the answer is for CuNi|the answer is for NiCu"),
        ({"crystal": Crystal.from_symbols(2.6 * np.eye(3), ["Cu"], [[0, 0, 0]])}, "the answer is for Cu"),
        ({"crystal": moved([0.5, 0.5, 0.5], factor=60.0)}, r"angstrom\^3 per atom, expected 2 to 400"),
        ({"crystal": moved([0.5, 0.5, 0.5], factor=0.1)}, r"angstrom\^3 per atom, expected 2 to 400"),
        ({"crystal": moved([0.05, 0.0, 0.0])}, "they overlap"),
        ({"crystal": NAN_COORDINATE}, "not a finite number"),
        ({"crystal": None}, "converged without a crystal"),
        ({"energy_per_atom": None}, "converged without a crystal, energy_per_atom or e_form_per_atom"),
        ({"e_form_per_atom": None}, "converged without a crystal, energy_per_atom or e_form_per_atom"),
        ({"energy_per_atom": math.nan}, "energy_per_atom is nan eV/atom"),
        ({"energy_per_atom": -math.inf}, "energy_per_atom is -inf eV/atom"),
        ({"energy_per_atom": 2 * MAX_RAW_ENERGY}, "energy_per_atom is 200000.0 eV/atom"),
        ({"correction_per_atom": math.nan}, "correction_per_atom is nan eV/atom"),
        ({"e_form_per_atom": math.nan}, "e_form_per_atom is nan eV/atom, expected -6 to 5"),
        ({"e_form_per_atom": -6.5}, r"e_form_per_atom is -6\.5 eV/atom, expected -6 to 5"),
        ({"e_form_per_atom": 5.001}, r"e_form_per_atom is 5\.001 eV/atom, expected -6 to 5"),
        ({"cost_seconds": -1.0}, r"cost_seconds is -1\.0"),
        ({"cost_seconds": math.inf}, "cost_seconds is inf"),
        ({"cost_seconds": math.nan}, "cost_seconds is nan"),
        ({"cost_seconds": 1e11}, r"cost_seconds is 1e\+11|cost_seconds is 100000000000"),
        ({"n_steps": -1}, r"n_steps is -1\.0, expected 0 to"),
        ({"n_steps": 2.5}, "n_steps is 2.5, expected a whole number"),
        ({"n_steps": None}, "n_steps is None"),
        ({"n_steps": 10**400}, "n_steps is 1000"),
        ({"energy_per_atom": "-3.5"}, "energy_per_atom is '-3.5'"),
        ({"energy_per_atom": np.array([1.0, 2.0])}, "energy_per_atom is array"),
        ({"energy_per_atom": -3.5 + 1j}, "energy_per_atom is "),
        ({"energy_per_atom": np.complex128(-3.5 + 1j)}, "energy_per_atom is "),
        ({"correction_per_atom": None}, "correction_per_atom is None"),
        ({"max_force": math.nan}, "max_force is nan eV/angstrom"),
        ({"max_force": -0.1}, "max_force is -0.1 eV/angstrom"),
        ({"forces": [[0.0, 0.0, math.nan], [0.0, 0.0, 0.0]]}, "forces is nan in 1 of 6 places"),
        ({"forces": np.full((2, 3), np.inf)}, "forces is inf in 6 of 6 places"),
        ({"forces": [[0.0, 0.0, 0.0]]}, r"forces is of shape \(1, 3\), expected \(2, 3\)"),
        ({"forces": [[0.0], [0.0, 0.0]]}, r"forces is .*expected numbers of shape \(2, 3\)"),
        ({"forces": np.ones((2, 3)) * 1j}, "forces is .*expected real numbers"),
        ({"stress": [1.0] * 6}, r"stress is of shape \(6,\), expected \(3, 3\)"),
        ({"stress": np.diag([1.0, np.nan, 1.0])}, "stress is nan in 1 of 9 places"),
        ({"magnetic_moments": [math.nan, 0.0]}, "magnetic_moments is nan"),
        ({"crystal": RELAXED.to_dict()}, "crystal is .*expected a Crystal"),
        ({"method": "emt"}, "the answer is of method 'emt'"),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_true_is_a_failure_that_can_be_stored(changes: dict[str, Any], words: str) -> None:
    found = admit(answer(**changes), ASKED, METHOD)
    assert (found.id, found.converged, found.failure) == ("a", False, Failure.IMPLAUSIBLE)
    assert found.method == METHOD
    assert found.crystal is found.energy_per_atom is found.e_form_per_atom is None
    assert re.search(words, found.message), found.message
    assert found.message.startswith("ZnCu: ")
    assert found.cost_seconds == (0.0 if "cost_seconds" in changes else 2.5)
    assert found.forces is found.stress is found.magnetic_moments is None
    assert evaluation_record(found, 1).failure == "implausible"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crystal": ASKED},
        {"e_form_per_atom": -6.0},
        {"e_form_per_atom": 5.0},
        {"energy_per_atom": -MAX_RAW_ENERGY},
        {"cost_seconds": 0.0},
        {"crystal": Crystal(np.diag([2.9, 2.9, 5.8]), [29, 30] * 2, [[0, 0, k / 2 + s] for k in (0, 1) for s in (0, 0.25)])},
        {"method": replace(METHOD, versions={"ase": "9.9"})},
    ],
)
def test_a_good_answer_passes_as_it_is(changes: dict[str, Any]) -> None:
    good = answer(**changes)
    assert admit(good, ASKED, METHOD) == good


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    forces = np.arange(6.0).reshape(2, 3)
    found = admit(
        answer(
            energy_per_atom=np.float32(-3.5), e_form_per_atom=np.array(-0.125), n_steps=np.int64(7), cost_seconds=3, forces=forces,
            stress=np.eye(3), magnetic_moments=(np.float64(1), 2), converged=np.True_,
        ),
        ASKED,
        METHOD,
    )  # fmt: skip
    assert found == answer(
        energy_per_atom=-3.5, e_form_per_atom=-0.125, cost_seconds=3.0, forces=forces.tolist(), stress=np.eye(3).tolist(),
        magnetic_moments=[1.0, 2.0],
    )  # fmt: skip
    kinds = {name: type(getattr(found, name)) for name in ("energy_per_atom", "n_steps", "cost_seconds", "forces", "converged")}
    assert list(kinds.values()) == [float, int, float, list, bool]


def test_a_failure_passes_as_it_is() -> None:
    """A relaxation that ran away keeps where it got to."""
    failed = answer(converged=False, failure=Failure.NOT_CONVERGED, message="slow", crystal=moved([0.05, 0, 0]))
    assert admit(failed, ASKED, METHOD) == failed


@pytest.mark.parametrize(
    ("changes", "kept", "words"),
    [
        ({"cost_seconds": math.nan}, {"cost_seconds": 0.0}, "(not kept: cost_seconds is nan"),
        ({"cost_seconds": math.inf}, {"cost_seconds": 0.0}, "cost_seconds is inf"),
        ({"cost_seconds": -1}, {"cost_seconds": 0.0}, "cost_seconds is -1.0"),
        ({"cost_seconds": 1e11}, {"cost_seconds": 0.0}, "cost_seconds is 100000000000.0"),
        ({"n_steps": -1}, {"n_steps": 0}, "n_steps is -1.0"),
        ({"forces": [[math.nan] * 3] * 2}, {"forces": None}, "forces is nan in 6 of 6 places"),
        ({"forces": np.zeros((2, 3))}, {"forces": [[0.0] * 3] * 2}, None),
        ({"e_form_per_atom": math.nan}, {"e_form_per_atom": None}, "e_form_per_atom is nan"),
        ({"crystal": NAN_COORDINATE}, {"crystal": None}, "crystal is not made of finite numbers"),
        ({"max_force": math.inf}, {"max_force": None}, "max_force is inf"),
        ({"failure": "too slow"}, {"failure": Failure.IMPLAUSIBLE}, "failure is 'too slow'"),
        ({"failure": "timeout"}, {"failure": Failure.TIMEOUT}, None),
        ({"failure": None}, {"failure": Failure.IMPLAUSIBLE}, "neither converged nor with a failure"),
        ({"converged": True}, {"failure": Failure.NOT_CONVERGED}, "with a failure and said to have converged"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_of_a_failure_is_left_out_and_said(
    changes: dict[str, Any], kept: dict[str, Any], words: str | None
) -> None:
    failed = answer(**{"converged": False, "failure": Failure.NOT_CONVERGED, "message": "slow", **changes})
    found = admit(failed, ASKED, METHOD)
    assert {name: getattr(found, name) for name in kept} == kept
    assert not found.converged
    assert found.message == "slow" if words is None else found.message.startswith("slow") and words in found.message


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("half a character \ud800.", "half a character ?."),
        ("null\x00", "null"),
        ("", "timeout"),
        (None, "timeout"),
        (RuntimeError("no text"), "no text"),
        ("x" * 5000, "x" * 2000 + " ..."),
    ],
)
def test_a_message_can_be_stored(message: Any, kept: str) -> None:
    failed = answer(converged=False, failure=Failure.TIMEOUT, message=message)
    assert admit(failed, ASKED, METHOD).message == kept


def test_versions_that_are_no_json_are_not_kept() -> None:
    odd = replace(METHOD, versions={"ase": object()})  # type: ignore[dict-item]
    assert admit(answer(method=odd), ASKED, METHOD).method == METHOD


def test_a_failure_of_another_method_is_none_of_ours() -> None:
    other = answer(
        method=Method(code="there", functional="f"), converged=False, failure=Failure.CRASHED, message="x",
        crystal=None, energy_per_atom=None, e_form_per_atom=None,
    )  # fmt: skip
    assert admit(other, ASKED, METHOD).failure is Failure.IMPLAUSIBLE


def test_the_gate_is_the_callers() -> None:
    narrow = GateSettings(max_atoms=1)
    assert admit(answer(), ASKED, METHOD, gate=narrow).failure is Failure.IMPLAUSIBLE
