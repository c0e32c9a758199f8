"""Faults that were found in the loop, each as its kind: rounds that cannot end, crystals paid for twice, programs that live on."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from emt_world import Listening, copy_world, l1_0, l1_2, round_settings, settings_in, write_folder

from dft_stub.evaluator import Evaluation, Failure
from dft_stub.recorded import evaluation_to_dict
from flows import filtering
from flows.evaluating import evaluate_crystals
from flows.importing import import_crystals
from flows.reports import headline, round_lines
from flows.rounds import chosen
from flows.seeding import add_seeds
from flows.settings import Settings
from flows.stages import STAGES, abandon_round, begin_round, run_round, run_shard
from flows.workspace import Workspace, open_workspace
from gnome.atomic_write import atomic_write
from gnome.crystals.crystal import Crystal
from gnome.crystals.identity import same_crystal
from gnome.crystals.shards import read_shard, write_shard
from gnome.crystals.validity import DEFAULT_GATE
from gnome.database.query import query
from gnome.database.records import EvaluationRecord
from gnome.errors import InvalidInput
from gnome.processes import child_environment
from gnome.shipped import shipped_data
from gnome.stability.method import Method
from pipelines.screening import Refusal, Screening

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT.parent / "shared" / "cases" / "loop-faults"

pytestmark = pytest.mark.usefixtures("own_folder")


def record_answers(world: Path, path: Path, **of_the_first: Any) -> list[str]:
    """Write down what a round's evaluations answered, the first of them changed; returns the candidates' ids, that one first."""
    with open_workspace(settings_in(world)) as workspace:
        records = workspace.store.evaluations_of_round(1)
        candidates = workspace.store.candidates([record.candidate_id for record in records])
        known = list(workspace.store.crystals_of(workspace.evaluator.method.label, before_round=1))
        method = workspace.evaluator.method
    answers = [
        Evaluation(
            id=candidates[record.candidate_id].crystal.id, method=method, converged=True, crystal=record.crystal,
            energy_per_atom=record.energy_per_atom, e_form_per_atom=record.e_form_per_atom, cost_seconds=1.0,
        )
        for record in records
    ]  # fmt: skip
    changes = {name: change(answers[0]) for name, change in of_the_first.items()}
    answers[0] = replace(answers[0], **changes)
    answers += [  # so that the table knows every element
        Evaluation(id=f"known {one.id}", method=method, converged=True, crystal=one.crystal, energy_per_atom=0, e_form_per_atom=0)
        for one in known
    ]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(evaluation_to_dict(answer)) + "\n" for answer in answers))
    return [record.candidate_id for record in records]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("crystal", lambda answer: answer.crystal.scaled(60.0)),
        ("crystal", lambda answer: answer.crystal.with_atomic_numbers([46] * answer.crystal.n_atoms)),
        ("e_form_per_atom", lambda answer: -9.0),
        ("cost_seconds", lambda answer: float("inf")),
    ],
    ids=["hollow", "another formula", "energy of no solid", "endless cost"],
)
def test_an_answer_that_cannot_be_true_costs_itself_alone(
    after_round: Path, emt_world: Path, tmp_path: Path, name: str, change: Any
) -> None:
    recorded = tmp_path / "answers.jsonl"
    bad, *_ = record_answers(after_round, recorded, **{name: change})
    settings = copy_world(emt_world, tmp_path / "again")
    with open_workspace(settings, evaluator=f"recorded:{recorded}") as workspace:
        record = run_round(workspace, round_settings())
        stored = {one.candidate_id: one for one in workspace.store.evaluations_of_round(1)}
        discovered = {row["candidate_id"] for row in query(workspace.store, "_gnome_round = 1")}
    assert record.state == "finished"
    assert record.summary is not None
    assert record.summary["failures"] == {"implausible": 1}
    assert record.summary["n_converged"] == len(stored) - 1 == 5
    assert (stored[bad].converged, stored[bad].failure, stored[bad].e_form_per_atom) == (False, "implausible", None)
    assert stored[bad].message
    assert bad not in discovered
    with open_workspace(settings) as workspace:
        again = import_crystals(workspace, write_folder(tmp_path / "more", {"Pt3Au": l1_2("Au", "Pt")}))
    assert (again.n_imported + again.n_known, again.refused) == (1, ())


@pytest.mark.parametrize("breaks", ["assess", "update_hull", "hits_of_round"])
def test_a_round_can_be_given_up_whatever_fails(
    emt_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise InvalidInput("this cannot be assessed")

    settings, heard = copy_world(emt_world, tmp_path), Listening()
    with open_workspace(settings, listener=heard) as workspace:
        begin_round(workspace, round_settings())
        with monkeypatch.context() as patch:
            patch.setattr(f"flows.stages.{breaks}", broken)
            record = abandon_round(workspace)
        assert record.state == "failed"
        assert record.summary is not None
        assert record.summary["not_assessed"] == "InvalidInput: this cannot be assessed"
        assert any("round 1" in words and "this cannot be assessed" in words for words in heard.said)
        assert round_lines(record) == ["Round 1 was given up: InvalidInput: this cannot be assessed."]
        assert workspace.store.open_round() is None
        with pytest.raises(InvalidInput, match="has no unfinished round"):
            abandon_round(workspace)
        source = write_folder(tmp_path / "more", {"PtAu": l1_0("Pt", "Au")})
        assert import_crystals(workspace, source).n_imported == 1
        assert begin_round(workspace, round_settings()).number == 2


def test_no_crystal_is_evaluated_twice_where_compositions_are_few(emt_world: Path, tmp_path: Path) -> None:
    """A budget beyond what there is gets all there is, once."""
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        settings = round_settings(
            elements=("Cu", "Au", "Ni"), budget=40, n_candidates=300, n_screened=120, n_scales=1, charge_balanced=False,
            second_look=False, formula_check=False,
        )  # fmt: skip
        number = begin_round(workspace, settings).number
        for stage in STAGES[: STAGES.index("evaluate")]:
            run_shard(workspace, number, stage, 0)
        ids = chosen(workspace, number)
        crystals = [record.crystal for record in workspace.store.candidates(ids).values()]
        proposed = [record.crystal for record in workspace.store.candidates_of_round(number)]
    assert len(ids) == len(crystals) < 40
    assert len({crystal.id for crystal in proposed}) == len(proposed), "nor proposed twice"
    formulas = Counter(crystal.reduced_formula for crystal in crystals)
    assert formulas.keys() == {crystal.reduced_formula for crystal in proposed}
    assert max(formulas.values()) > 1, "compositions are fewer than the budget"
    for i, crystal in enumerate(crystals):
        assert not any(same_crystal(crystal, other) for other in crystals[:i] if other.reduced_formula == crystal.reduced_formula)


class TwoAttempts:
    """Answers `first` to every crystal that it has not seen before, `then` to others; None stands for Ctrl-C."""

    name = "two attempts"
    gate = DEFAULT_GATE
    computes = True

    def __init__(self, method: Method, first: dict[str, Any], then: dict[str, Any] | None) -> None:
        self.method, self.first, self.then = method, first, then
        self.asked: Counter[str] = Counter()
        self.left: dict[str, list[str]] = {}

    def submit(self, crystals: Mapping[str, Crystal]) -> str:
        self.asked.update(list(crystals))
        self.left[ticket := str(len(self.left))] = list(crystals)
        return ticket

    def collect(self, ticket: str) -> Iterator[Evaluation]:
        while self.left[ticket]:
            identifier = self.left[ticket].pop()
            answer = self.first if self.asked[identifier] == 1 else self.then
            if answer is None:
                raise KeyboardInterrupt
            yield Evaluation(id=identifier, method=self.method, converged=False, **answer)

    def pending(self, ticket: str) -> frozenset[str]:
        return frozenset(self.left[ticket])

    def close(self) -> None: ...


def begun(workspace: Workspace, first: dict[str, Any], then: dict[str, Any] | None) -> tuple[TwoAttempts, dict[str, Crystal]]:
    """A round with two proposed crystals, and an evaluator that fails them."""
    number = begin_round(workspace, round_settings()).number
    run_shard(workspace, number, "propose", 0)
    ids = workspace.store.candidate_ids_of_round(number)[:2]
    evaluator = TwoAttempts(workspace.evaluator.method, first, then)
    vars(workspace)["evaluator"] = evaluator
    return evaluator, {identifier: one.crystal for identifier, one in workspace.store.candidates(ids).items()}


def told(records: list[EvaluationRecord]) -> set[tuple[Any, ...]]:
    return {(one.failure, one.attempts, one.cost_seconds, one.message) for one in records}


SLOW = {"failure": Failure.TIMEOUT, "message": "slow", "cost_seconds": 900.0}
STUCK = {"failure": Failure.NOT_CONVERGED, "message": "stuck", "cost_seconds": 1.5}


@pytest.mark.parametrize("first", [SLOW, {**SLOW, "failure": Failure.CRASHED}, {**SLOW, "failure": Failure.OUT_OF_MEMORY}])
def test_both_attempts_are_kept_and_paid_for(emt_world: Path, tmp_path: Path, first: dict[str, Any]) -> None:
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        evaluator, crystals = begun(workspace, first, STUCK)
        evaluate_crystals(workspace, 1, crystals)
        stored = workspace.store.evaluations_of_round(1)
        again = evaluate_crystals(workspace, 1, crystals)
    assert len(stored) == 2
    assert told(stored) == {("not_converged", 2, 901.5, "stuck; first attempt: slow")}
    assert set(evaluator.asked.values()) == {2}, "and not a third time"
    assert again == {"n": 0, "failures": {}}


def test_an_interruption_between_the_attempts_goes_on_with_the_second(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        evaluator, crystals = begun(workspace, SLOW, None)
        with pytest.raises(KeyboardInterrupt):
            evaluate_crystals(workspace, 1, crystals)
        assert told(workspace.store.evaluations_of_round(1)) == {("timeout", 1, 900.0, "slow")}, "the first is on record"
    with open_workspace(settings_in(tmp_path)) as workspace:
        method = workspace.evaluator.method
        later = TwoAttempts(method, STUCK, STUCK)
        vars(workspace)["evaluator"] = later
        result = evaluate_crystals(workspace, 1, crystals)
        assert set(later.asked.values()) == {1}
        assert told(workspace.store.evaluations_of_round(1)) == {("not_converged", 2, 901.5, "stuck; first attempt: slow")}
    assert result["failures"] == {"not_converged": 2}
    assert set(evaluator.asked.values()) == {2}


class AtOnce:
    """Answers with the crystal as it is."""

    name = "chgnet"
    gate = DEFAULT_GATE
    computes = True

    def __init__(self, method: Method, elements: frozenset[int]) -> None:
        self.method, self.elements = method, elements
        self.asked: dict[str, Crystal] = {}

    def submit(self, crystals: Mapping[str, Crystal]) -> str:
        self.asked = dict(crystals)
        return "ticket"

    def collect(self, _: str) -> Iterator[Evaluation]:
        while self.asked:
            identifier, crystal = self.asked.popitem()
            yield Evaluation(
                id=identifier, method=self.method, converged=True, crystal=crystal, energy_per_atom=-4.0, e_form_per_atom=-0.5
            )

    def pending(self, _: str) -> frozenset[str]:
        return frozenset(self.asked)

    def close(self) -> None: ...


@pytest.mark.filterwarnings("ignore:No Pauling electronegativity:UserWarning")
@pytest.mark.parametrize("imported", [True, False])
def test_an_import_before_the_first_round_keeps_no_seed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imported: bool
) -> None:
    crystals, columns, metadata = read_shard(shipped_data() / "seeds.parquet")
    method, n = Method.from_dict(metadata["method"]), 40
    write_shard(tmp_path / "seeds.parquet", crystals[:n], {name: column[:n] for name, column in columns.items()}, metadata)
    monkeypatch.setattr("flows.seeding.shipped_data", lambda: tmp_path)
    settings = Settings(database_url=f"sqlite:///{tmp_path / 'gnome.db'}", workers=1)
    with open_workspace(settings, evaluator="chgnet") as workspace:
        vars(workspace)["evaluator"] = AtOnce(method, frozenset(range(1, 95)))
        if imported:
            found = import_crystals(workspace, write_folder(tmp_path / "mine", {"Pt3Au": l1_2("Au", "Pt")}))
            assert (found.n_imported, found.method) == (1, method.label)
        assert add_seeds(workspace) == n
        assert add_seeds(workspace) == 0
        rows = query(workspace.store, "")
        assert not workspace.store.has_unplaced(method.label)
    assert Counter(row["origin"] for row in rows) == Counter(seed=n, **({"imported": 1} if imported else {}))
    assert {row["id"] for row in rows if row["origin"] == "seed"} == {crystal.id for crystal in crystals[:n]}
    changed = {name: column[1 : n + 1] for name, column in columns.items()}
    write_shard(tmp_path / "seeds.parquet", crystals[1 : n + 1], changed, metadata)
    with open_workspace(settings, evaluator="chgnet") as workspace:
        vars(workspace)["evaluator"] = AtOnce(method, frozenset(range(1, 95)))
        assert add_seeds(workspace) == 1, "a newer file brings what it has more"


@pytest.mark.filterwarnings("ignore:No Pauling electronegativity:UserWarning")
def test_a_seed_that_was_imported_before_does_not_stand_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crystals, columns, metadata = read_shard(shipped_data() / "seeds.parquet")
    method, n = Method.from_dict(metadata["method"]), 40
    write_shard(tmp_path / "seeds.parquet", crystals[:n], {name: column[:n] for name, column in columns.items()}, metadata)
    monkeypatch.setattr("flows.seeding.shipped_data", lambda: tmp_path)
    with open_workspace(Settings(database_url=f"sqlite:///{tmp_path / 'gnome.db'}", workers=1), evaluator="chgnet") as workspace:
        vars(workspace)["evaluator"] = AtOnce(method, frozenset(range(1, 95)))
        slightly_off = crystals[7].scaled(1.003)
        found = import_crystals(workspace, write_folder(tmp_path / "mine", {"own": slightly_off}))
        assert found.n_imported == 1
        assert add_seeds(workspace) == n - 1
        rows = query(workspace.store, "")
    assert Counter(row["origin"] for row in rows) == Counter(seed=n - 1, imported=1)
    seeds = {row["id"] for row in rows if row["origin"] == "seed"}
    assert seeds == {crystal.id for crystal in crystals[:n]} - {crystals[7].id}


def test_a_round_without_a_substitution_says_that_nothing_was_proposed(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        record = run_round(workspace, round_settings(elements=("Ag",)))
    assert record.summary is not None
    words = record.summary["emptied_by"]
    assert words.startswith("propose: the generators (structural) made no new composition within Ag out of 18 known crystals")
    assert "import more" in words
    assert headline(record, [], n_known=18) == [f"Round 1 evaluated nothing. {words}."]
    assert f"Nothing was evaluated. {words}." in round_lines(record)


@pytest.mark.parametrize("stage", ["look", "screen"])
def test_a_round_in_which_all_is_refused_says_where_and_why(
    emt_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    screen = filtering.screen

    def refusing(candidates: Any, model: Any, hull: Any, settings: Any, *rest: Any) -> Screening:
        if stage == "screen" and settings.n_scales != 2:
            return screen(candidates, model, hull, settings, *rest)
        reasons = ["overlap" if i % 2 else "volume" for i in range(len(candidates))]
        refusals = tuple(Refusal(candidate_id=c.id, reason=r, message="") for c, r in zip(candidates, reasons, strict=True))
        return Screening(predictions=(), refusals=refusals)

    monkeypatch.setattr("flows.filtering.screen", refusing)
    copy_world(emt_world, tmp_path)
    with open_workspace(settings_in(tmp_path)) as workspace:
        wanted = round_settings(n_candidates=10, n_screened=10, budget=2, n_scales=2, second_look=False)
        record = run_round(workspace, wanted)
    assert record.summary is not None
    assert record.summary["emptied_by"] == f"{stage}: every candidate was refused (5 volume, 5 overlap)"
    assert (record.summary["n_screened"], record.summary["n_evaluated"]) == (0, 0)


@pytest.mark.slow
def test_the_case_of_a_round_with_copies(tmp_path: Path) -> None:
    printed = run_case("dup_round.py", tmp_path)
    evaluated = re.search(r"evaluations (\d+) distinct crystals handed in (\d+)", printed)
    proposed = re.search(r"candidates (\d+) distinct (\d+)", printed)
    assert evaluated is not None, printed
    assert proposed is not None, printed
    assert evaluated[1] == evaluated[2] != "0", printed
    assert proposed[1] == proposed[2] != "0", printed


@pytest.mark.slow
def test_the_case_of_a_choice_with_copies(tmp_path: Path) -> None:
    chosen_and_distinct = re.findall(r"budget 60 chosen (\d+) distinct crystals (\d+)", run_case("select_real.py", tmp_path))
    assert len(chosen_and_distinct) == 3
    assert all(n == m == "60" for n, m in chosen_and_distinct), chosen_and_distinct


def test_the_case_of_a_gutted_flow(tmp_path: Path) -> None:
    """The flow that Prefect loads by its file has all that it calls; with foreign folders of its name, see `test_prefect_faults`."""
    if not (CASES / "pf.sh").exists():
        pytest.skip(f"{CASES / 'pf.sh'} is not here")
    script = (CASES / "pf.sh").read_text().replace(".venv/bin/python", sys.executable)
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env={**child_environment(), "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[0] == "True campaign", done.stdout


def run_case(name: str, folder: Path) -> str:
    """Run a script of a fault from the project's root, whose temporary folders it is helped to make; returns what it printed."""
    if not (CASES / name).exists():
        pytest.skip(f"{CASES / name} is not here")
    script = folder / name
    script.write_text((CASES / name).read_text().replace("Path(tempfile.mkdtemp)", "Path(tempfile.mkdtemp())"))
    shutil.copy(CASES / "slowcalc.py", folder)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(folder)])
    done = subprocess.run(
        [sys.executable, script],
        cwd=folder if name == "shadow.py" else ROOT,
        env={**child_environment(), "PYTHONPATH": paths, "TMPDIR": str(folder), "XDG_DATA_HOME": str(folder / "data")},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("stuck.py", ["run -> finished", "round state: finished"], marks=pytest.mark.slow),
        pytest.param("retry.py", ["('not_converged', 901.0, 'x; first attempt: slow')"], marks=pytest.mark.slow),
        ("orphan.py", ["timeout Cu: no answer within 4 seconds", "still running after the evaluator was closed: \n"]),
        ("shadow.py", ["parent uses", "failures=()"]),
    ],
)
def test_the_cases(tmp_path: Path, name: str, expected: list[str]) -> None:
    if name == "shadow.py":
        for package in ("pipelines", "flows"):
            (tmp_path / package).mkdir()
            (tmp_path / package / "__init__.py").write_text("raise SystemExit('not the program')\n")
    printed = run_case(name, tmp_path)
    for words in expected:
        assert words in printed, printed
