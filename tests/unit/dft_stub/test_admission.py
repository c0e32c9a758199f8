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
        ({"e_form_per_atom": math.nan}, "formation energy nan eV/atom, expected -6 to 5"),
        ({"e_form_per_atom": -6.5}, r"formation energy -6\.500 eV/atom, expected -6 to 5"),
        ({"e_form_per_atom": 5.001}, r"formation energy 5\.001 eV/atom, expected -6 to 5"),
        ({"cost_seconds": -1.0}, r"cost_seconds is -1\.0"),
        ({"cost_seconds": math.inf}, "cost_seconds is inf"),
        ({"cost_seconds": math.nan}, "cost_seconds is nan"),
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
    assert admit(good, ASKED, METHOD) is good


def test_a_failure_passes_as_it_is() -> None:
    """Whatever it holds: a relaxation that ran away keeps where it got to."""
    failed = answer(
        converged=False, failure=Failure.NOT_CONVERGED, message="slow", crystal=moved([0.05, 0, 0]), e_form_per_atom=math.nan
    )
    assert admit(failed, ASKED, METHOD) is failed


def test_a_failure_of_another_method_is_none_of_ours() -> None:
    other = answer(
        method=Method(code="there", functional="f"), converged=False, failure=Failure.CRASHED, message="x",
        crystal=None, energy_per_atom=None, e_form_per_atom=None,
    )  # fmt: skip
    assert admit(other, ASKED, METHOD).failure is Failure.IMPLAUSIBLE


def test_the_gate_is_the_callers() -> None:
    narrow = GateSettings(max_atoms=1)
    assert admit(answer(), ASKED, METHOD, gate=narrow).failure is Failure.IMPLAUSIBLE
