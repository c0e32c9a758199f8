"""Every evaluator against the contract, and against what it promises beyond."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE

from dft_stub.ase_codes import ASEEvaluator, ASEPotential
from dft_stub.chgnet import CHGNetEvaluator
from dft_stub.evaluator import Evaluation, Failure, validate_evaluator
from dft_stub.recorded import RecordedEvaluator, evaluation_from_dict, evaluation_to_dict
from dft_stub.references import read_references, shipped_ground_states, shipped_references
from dft_stub.registry import EVALUATORS, make_evaluator
from dft_stub.relaxer import Relaxation, RelaxSettings
from flows.evaluating import answers
from gnome.crystals.convert import from_atoms, to_atoms
from gnome.crystals.crystal import Crystal
from gnome.crystals.shards import write_shard
from gnome.errors import EvaluatorUnavailable, InvalidInput
from gnome.stability.method import Method

CUBIC_CU3AU = Crystal.from_symbols(
    [[3.8, 0, 0], [0, 3.8, 0], [0, 0, 3.8]], ["Au", "Cu", "Cu", "Cu"], [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
)
CUAU = Crystal.from_symbols([[2.75, 0, 0], [0, 2.75, 0], [0, 0, 3.8]], ["Cu", "Au"], [[0, 0, 0], [0.5, 0.5, 0.5]])
GROUND_STATES = {z: [from_atoms(bulk(symbol))] for z, symbol in ((29, "Cu"), (79, "Au"))}
METHOD = Method(code="notebook", functional="none")


def test_emt_keeps_the_contract_and_makes_its_references_once(tmp_path: Path) -> None:
    path = tmp_path / "emt.json"
    evaluator = make_evaluator("emt", references_path=path, ground_states=GROUND_STATES, workers=1)
    assert isinstance(evaluator, ASEEvaluator)
    try:
        validate_evaluator(evaluator, [CUBIC_CU3AU, CUAU])
        written = path.read_text()
        (answer,) = evaluator.collect(evaluator.submit({"a": CUAU}))
    finally:
        evaluator.close()
    assert path.read_text() == written
    assert answer.e_form_per_atom is not None
    assert -0.2 < answer.e_form_per_atom < 0.0, "EMT's CuAu is stable by some 60 meV/atom"
    assert read_references(path).energies[29] == pytest.approx(_ase_energy(GROUND_STATES[29][0]), abs=1e-3)
    assert evaluator.elements == {29, 79}
    (unsupported,) = evaluator.collect(evaluator.submit({"iron": from_atoms(bulk("Fe"))}))
    assert unsupported.failure is Failure.UNSUPPORTED_ELEMENT


def _ase_energy(crystal: Crystal) -> float:
    atoms = to_atoms(crystal)
    atoms.calc = EMT()
    FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=0.01, steps=500)
    return float(atoms.get_potential_energy()) / len(atoms)


def test_references_of_other_keywords_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "references.json"
    potential = ASEPotential(calculator_name="emt")
    evaluator = ASEEvaluator(potential, references_path=path, ground_states=GROUND_STATES, workers=1)
    evaluator.prepare(frozenset({29}))
    evaluator.close()
    other = ASEPotential(calculator_name="ase.calculators.emt.EMT", keywords={"asap_cutoff": True})
    with pytest.raises(EvaluatorUnavailable, match="belong to method"):
        ASEEvaluator(other, references_path=path, ground_states=GROUND_STATES)


def test_an_element_without_a_relaxed_form_is_an_error_that_names_it(tmp_path: Path) -> None:
    tiny = {29: [GROUND_STATES[29][0].scaled(0.01)]}
    evaluator = make_evaluator("emt", references_path=tmp_path / "r.json", ground_states=tiny, workers=1)
    ticket = evaluator.submit({"a": GROUND_STATES[29][0]})
    with pytest.raises(EvaluatorUnavailable, match="no form of Cu could be relaxed"):
        list(evaluator.collect(ticket))


def test_chgnet_keeps_the_contract_and_agrees_with_ase_alone() -> None:
    from dft_stub.potentials import CHGNetPotential

    salt = Crystal.from_symbols([[0, 2.9, 2.9], [2.9, 0, 2.9], [2.9, 2.9, 0]], ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.49]])
    metal = from_atoms(bulk("Mg"))
    evaluator = CHGNetEvaluator(workers=1)
    try:
        validate_evaluator(evaluator, [salt, metal])
        (answer,) = evaluator.collect(evaluator.submit({"salt": salt}))
    finally:
        evaluator.close()
    assert answer.crystal is not None
    assert answer.energy_per_atom is not None
    assert answer.max_force is not None
    assert answer.max_force < 1.1 * RelaxSettings().fmax
    assert answer.forces is not None
    assert answer.magnetic_moments is not None
    assert (len(answer.forces), len(answer.magnetic_moments)) == (2, 2)
    atoms = to_atoms(salt)
    atoms.calc = CHGNetPotential().calculator()
    FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=0.03, steps=400)
    assert answer.energy_per_atom == pytest.approx(float(atoms.get_potential_energy()) / 2, abs=2e-3)
    assert answer.e_form_per_atom == pytest.approx(-2.07, abs=0.05), "rock salt: -2.1 eV/atom (CHGNet); -2.13 measured"


def recorded_line(crystal: Crystal, e_form: float = -0.5, **changes: object) -> str:
    evaluation = Evaluation(
        id=crystal.id,
        method=METHOD,
        converged=True,
        crystal=crystal,
        energy_per_atom=-3.0,
        e_form_per_atom=e_form,
        cost_seconds=7.0,
    )
    return json.dumps(evaluation_to_dict(replace(evaluation, **changes)))  # type: ignore[arg-type]


def test_recorded_answers_keep_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(recorded_line(CUAU) + "\n" + recorded_line(CUBIC_CU3AU, -0.4) + "\n")
    evaluator = make_evaluator(f"recorded:{path}", workers=2)
    validate_evaluator(evaluator, [CUAU, CUBIC_CU3AU, CUAU.scaled(1.1)])
    assert evaluator.method == METHOD
    (answer,) = evaluator.collect(evaluator.submit({"absent": CUAU.scaled(1.2)}))
    assert (answer.failure, answer.id) == (Failure.NO_ANSWER, "absent")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (lambda: recorded_line(CUAU, -7.0), "e_form_per_atom is -7.0 eV/atom"),
        (lambda: recorded_line(CUAU, float("nan")), "e_form_per_atom is nan"),
        (lambda: recorded_line(CUBIC_CU3AU).replace(CUBIC_CU3AU.id, CUAU.id), "the answer is for Cu3Au"),
    ],
)
def test_a_recorded_answer_that_cannot_be_is_a_failure(tmp_path: Path, line: Callable[[], str], message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(line() + "\n")
    evaluator = RecordedEvaluator(path)
    (answer,) = answers(evaluator, {"one": CUAU})
    assert (answer.converged, answer.failure, answer.crystal) == (False, Failure.IMPLAUSIBLE, None)
    assert message in answer.message


def test_a_reference_waits_for_a_form_that_ran_into_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest form may be the one that took too long."""
    evaluator = ASEEvaluator(
        ASEPotential(calculator_name="emt"),
        references_path=tmp_path / "references.json",
        ground_states={29: GROUND_STATES[29] * 2},
    )
    slow = Relaxation(failure=Failure.TIMEOUT, message="Cu: no answer within 900 s")
    quick = Relaxation(crystal=GROUND_STATES[29][0], energy_per_atom=0.0)
    monkeypatch.setattr(evaluator, "relax_only", lambda forms: dict(zip(forms, (slow, quick), strict=True)))
    with pytest.raises(
        EvaluatorUnavailable, match=r"had no fair chance: Cu: no answer within 900 s; raise GNOME_EVALUATION_SECONDS"
    ):
        evaluator.prepare(frozenset({29}))
    assert not (tmp_path / "references.json").exists()


def test_an_answer_may_come_later(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(recorded_line(CUAU) + "\n")
    evaluator = RecordedEvaluator(path, wait=True)
    ticket = evaluator.submit({"now": CUAU, "later": CUBIC_CU3AU})
    assert [answer.id for answer in evaluator.collect(ticket)] == ["now"]
    assert evaluator.pending(ticket) == {"later"}
    line = recorded_line(CUBIC_CU3AU)
    with path.open("a") as file:
        file.write(line[:50])
    assert not list(evaluator.collect(ticket)), "a line still being written is left alone"
    with path.open("a") as file:
        file.write(line[50:] + "\n")
    assert [answer.id for answer in evaluator.collect(ticket)] == ["later"]
    assert not evaluator.pending(ticket)


def test_a_shard_answers_too(tmp_path: Path) -> None:
    columns = {"id": [CUAU.id], "energy_per_atom": [-3.0], "e_form_per_atom": [-0.1]}
    write_shard(tmp_path / "s.parquet", [CUAU.scaled(1.01)], columns, {"method": METHOD.to_dict()})
    (answer,) = (evaluator := RecordedEvaluator(tmp_path / "s.parquet")).collect(evaluator.submit({"x": CUAU}))
    assert answer.crystal == CUAU.scaled(1.01)
    assert answer.e_form_per_atom == -0.1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no evaluation"),
        ("{oops\n\n", "line 1"),
        (
            recorded_line(CUAU) + "\n" + recorded_line(CUBIC_CU3AU, method=Method(code="b", functional="c")) + "\n",
            "several methods",
        ),
        (recorded_line(CUAU).replace('"converged": true', '"converged": "no"') + "\n\n", "line 1: .*converged is 'no'"),
        (
            recorded_line(CUAU).replace(f'"id": "{CUAU.id}"', '"id": 5') + "\n\n",
            "line 1: .*id 5, expected true or false and a text",
        ),
        ('{"energy": ' + "9" * 5000 + "}\n\n", "line 1"),
        ("[" * 200_000 + "\n\n", "line 1"),
        (
            recorded_line(CUAU) + "\n" + recorded_line(CUAU, energy_per_atom=-3.1) + "\n",
            "two energies of",
        ),
    ],
    ids=["empty", "broken", "mixed", "no boolean", "no text", "long number", "deep", "two energies"],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(EvaluatorUnavailable, match=message):
        RecordedEvaluator(tmp_path / "answers.jsonl")


def test_an_answer_that_was_computed_again_counts_in_the_place_of_the_first(tmp_path: Path) -> None:
    """On another machine it differs a little."""
    path = tmp_path / "answers.jsonl"
    path.write_text(recorded_line(CUAU) + "\n" + recorded_line(CUAU, energy_per_atom=-3.00005) + "\n")
    (found,) = (evaluator := RecordedEvaluator(path)).collect(evaluator.submit({"x": CUAU}))
    assert found.energy_per_atom == -3.00005


def test_evaluations_survive_json() -> None:
    failed = Evaluation(id="x", method=METHOD, converged=False, failure=Failure.TIMEOUT, message="slow", extra={"queue": "long"})
    assert evaluation_from_dict(json.loads(json.dumps(evaluation_to_dict(failed)))) == failed
    with pytest.raises(InvalidInput, match="not a record"):
        evaluation_from_dict({"id": "x"})


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("vsap", {}, InvalidInput, "no evaluator is called 'vsap'; there are chgnet"),
        ("chgnet", {"threads": 3}, InvalidInput, "evaluator 'chgnet': .*threads"),
        ("emt", {}, InvalidInput, "needs references_path"),
        ("recorded:", {}, InvalidInput, "needs the path"),
        ("recorded:/absent.jsonl", {}, EvaluatorUnavailable, "/absent.jsonl"),
        ("no.such.Thing", {"references_path": Path("x.json"), "ground_states": {}}, EvaluatorUnavailable, "cannot be loaded"),
    ],
)
def test_names_and_options_that_do_not_exist(name: str, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_evaluator(name, **options)


def test_the_registry_lists_what_it_makes() -> None:
    assert {"chgnet", "emt", "gpaw", "recorded:PATH"} <= set(EVALUATORS)


class Broken(RecordedEvaluator):
    """Breaks one clause of the contract at a time."""

    clause = ""

    @property
    def gate(self):  # type: ignore[no-untyped-def]
        return None if self.clause == "no gate" else super().gate

    def close(self) -> None:
        if self.clause == "forgetful":
            self._pending = {ticket: {} for ticket in self._pending}

    def collect(self, ticket):  # type: ignore[no-untyped-def]
        for answer in super().collect(ticket):
            if self.clause == "twice":
                yield answer
            if self.clause == "renamed":
                yield replace(answer, id="stranger")
            elif self.clause == "no failure":
                yield replace(answer, converged=False)
            elif self.clause == "no crystal":
                yield replace(answer, crystal=None)
            elif self.clause == "absurd":
                yield replace(answer, e_form_per_atom=-80.0)
            elif self.clause == "restless":
                self.n = getattr(self, "n", 0) + 1
                yield replace(answer, energy_per_atom=-3.0 - self.n)
            elif self.clause != "silent":
                yield answer


@pytest.mark.parametrize(
    "clause", ["twice", "renamed", "no failure", "no crystal", "absurd", "restless", "silent", "no gate", "forgetful"]
)
def test_the_validator_finds_broken_clauses(tmp_path: Path, clause: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(recorded_line(CUAU) + "\n" + recorded_line(CUBIC_CU3AU) + "\n")
    evaluator = Broken(path)
    validate_evaluator(evaluator, [CUAU, CUBIC_CU3AU])
    evaluator.clause = clause
    with pytest.raises(AssertionError, match="contract of evaluators"):
        validate_evaluator(evaluator, [CUAU, CUBIC_CU3AU])


def test_shipped_references_cover_the_shipped_ground_states() -> None:
    references = shipped_references()
    assert len(references.elements) == 89
    for z, forms in shipped_ground_states().items():
        assert z in references.elements
        assert forms


@pytest.mark.skipif(importlib.util.find_spec("gpaw") is None, reason="GPAW is not installed; pip install 'gnome-discovery[gpaw]'")
def test_gpaw_relaxes_a_cell_of_two_atoms(tmp_path: Path) -> None:
    silicon = from_atoms(bulk("Si", a=5.40))
    germanium = from_atoms(bulk("Ge", a=5.70))
    zincblende = Crystal.from_symbols(from_atoms(bulk("Si", a=5.6)).lattice, ["Si", "Ge"], [[0, 0, 0], [0.25, 0.25, 0.25]])
    evaluator = make_evaluator(
        "gpaw",
        references_path=tmp_path / "gpaw.json",
        ground_states={14: [silicon], 32: [germanium]},
        keywords={"mode": {"name": "pw", "ecut": 250}, "kpts": {"size": [3, 3, 3], "gamma": True}},
        settings=RelaxSettings(fmax=0.1, max_steps=30),
        workers=1,
    )
    try:
        (answer,) = evaluator.collect(evaluator.submit({"SiGe": zincblende}))
    finally:
        evaluator.close()
    assert answer.failure is None, answer.message
    assert answer.e_form_per_atom == pytest.approx(0.02, abs=0.05)
    assert answer.method.functional == "PBE"
