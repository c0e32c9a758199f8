"""Potentials that hang, eat memory, crash, raise or answer nonsense: each costs its own crystal, and the rest are answered."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "dft_stub"))

from fakes import Collapsing, FakePotential, fake_references

from dft_stub.evaluator import Failure
from dft_stub.relaxer import RelaxSettings, relax, relaxation_method
from dft_stub.relaxing import RelaxingEvaluator
from dft_stub.workers import WorkerLimits
from gnome.crystals.crystal import Crystal
from gnome.errors import EvaluatorUnavailable

LIMITS = WorkerLimits(seconds=4.0, memory_bytes=600 * 2**20)


def fcc(symbol: str, a: float = 3.8) -> Crystal:
    half = a / 2
    return Crystal.from_symbols([[0, half, half], [half, 0, half], [half, half, 0]], [symbol], [[0, 0, 0]])


def evaluator(potential: FakePotential | None = None, *, limits: WorkerLimits = LIMITS, workers: int = 2) -> RelaxingEvaluator:
    potential = potential or FakePotential()
    references = fake_references(relaxation_method(potential, RelaxSettings()).label)
    return RelaxingEvaluator(potential, references, workers=workers, limits=limits)


def test_every_fault_is_its_own_failure_and_the_rest_are_answered() -> None:
    subject = evaluator()
    crystals = {symbol: fcc(symbol) for symbol in ("Ni", "Pd", "Ag", "Al", "Pt", "Cu", "Au")}
    crystals |= {
        "copper again": fcc("Cu", 3.7),
        "overlapping": Crystal.from_symbols([[4, 0, 0], [0, 4, 0], [0, 0, 4]], ["Cu", "Cu"], [[0, 0, 0], [0.001, 0, 0]]),
        "tiny": fcc("Cu", 0.01),
        "unknown": fcc("Po"),
    }
    try:
        answers = {answer.id: answer for answer in subject.collect(subject.submit(crystals))}
    finally:
        subject.close()
    assert {name: answer.failure for name, answer in answers.items()} == {
        "Ni": Failure.TIMEOUT,
        "Pd": Failure.OUT_OF_MEMORY,
        "Ag": Failure.CRASHED,
        "Al": Failure.CRASHED,
        "Pt": Failure.IMPLAUSIBLE,
        "Cu": None,
        "Au": None,
        "copper again": None,
        "overlapping": Failure.REFUSED,
        "tiny": Failure.REFUSED,
        "unknown": Failure.UNSUPPORTED_ELEMENT,
    }
    assert "SIGSEGV" in answers["Ag"].message
    assert "RuntimeError: the wave function walked out" in answers["Al"].message
    assert "\n" not in answers["Al"].message
    assert answers["Cu"].energy_per_atom == pytest.approx(answers["copper again"].energy_per_atom, abs=1e-3)
    assert all(answer.message for answer in answers.values() if answer.failure)


def test_a_potential_that_cannot_be_loaded_is_one_clear_error() -> None:
    for potential, message in (
        (FakePotential(unusable=True), "weights are missing"),
        (FakePotential(dies_at_start=True), "no licence"),
    ):
        subject = evaluator(potential, workers=1)
        ticket = subject.submit({"a": fcc("Cu")})
        with pytest.raises(EvaluatorUnavailable, match=message):
            list(subject.collect(ticket))
        assert not subject._pool.worker_pids()
        assert subject.pending(ticket) == {"a"}, "nothing is lost"


def test_references_of_another_method_are_refused() -> None:
    with pytest.raises(EvaluatorUnavailable, match="belong to method other"):
        RelaxingEvaluator(FakePotential(), fake_references("other"))


def test_an_unknown_ticket_is_refused() -> None:
    with pytest.raises(EvaluatorUnavailable, match="no ticket"):
        list(evaluator().collect("fake-99"))


def test_a_collapse_is_stopped_before_the_potential_sees_it() -> None:
    Collapsing.n_calls = 0
    outcome = relax(fcc("Cu"), Collapsing())
    assert outcome.failure is Failure.IMPLAUSIBLE
    assert "volume went from" in outcome.message
    assert Collapsing.n_calls < 200


def test_an_interrupt_ends_the_workers_and_keeps_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = evaluator(workers=1)
    ticket = subject.submit({"a": fcc("Cu"), "b": fcc("Au")})
    pids = subject._pool.worker_pids()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dft_stub.workers.wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(subject.collect(ticket))
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert subject.pending(ticket) == {"a", "b"}
    assert {answer.id for answer in subject.collect(ticket) if answer.converged} == {"a", "b"}, "collecting again goes on"
    subject.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_workers_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import signal, sys
        from pathlib import Path
        from test_evaluator_faults import evaluator, fcc
        from dft_stub.workers import WorkerLimits
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        subject = evaluator(limits=WorkerLimits(seconds=600))
        ticket = subject.submit({"a": fcc("Ni"), "b": fcc("Ni", 3.7)})  # both hang
        Path(sys.argv[1]).write_text(" ".join(map(str, subject._pool.worker_pids())))
        list(subject.collect(ticket))
    """)
    )
    pids_file = tmp_path / "pids"
    paths = [str(Path(__file__).parent), *(str(Path(entry or ".").resolve()) for entry in sys.path)]
    parent = subprocess.Popen(
        [sys.executable, str(script), str(pids_file)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    _wait_for(lambda: pids_file.exists() and len(pids_file.read_text().split()) == 2, seconds=60)
    pids = [int(pid) for pid in pids_file.read_text().split()]
    time.sleep(3)  # let them load and hang
    assert all(psutil.pid_exists(pid) for pid in pids)
    if how is signal.SIGINT:
        os.killpg(parent.pid, how)  # a terminal interrupts the whole group
    else:
        parent.kill()
    _, errors = parent.communicate(timeout=30)
    _wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), seconds=15)
    if how is signal.SIGINT:
        assert b"KeyboardInterrupt" in errors
        assert parent.returncode != 0


def _wait_for(condition, seconds: float) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
