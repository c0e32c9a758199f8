"""Programs that a calculator starts: whatever way it ends, they end with it, and what they used is paid for."""

import os
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from ase.build import bulk

from dft_stub.ase_codes import ASEPotential
from dft_stub.evaluator import Evaluation, Failure
from dft_stub.references import write_references
from dft_stub.registry import make_evaluator
from dft_stub.relaxer import RelaxSettings, relaxation_method
from dft_stub.workers import WorkerLimits
from gnome.crystals.convert import from_atoms
from gnome.stability.references import ElementalReferences
from pipelines.pyxtal_structures import PyXtalStructures

pytestmark = pytest.mark.usefixtures("own_folder")


def sleeping(seconds: str) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if (process.info["cmdline"] or [])[-2:] == ["sleep", seconds] and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


@pytest.mark.parametrize("launcher", [[], ["setsid", "-w"]], ids=["in the group", "in a session of its own"])
def test_a_time_limit_ends_the_calculators_own_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: list[str]
) -> None:
    seconds, module = f"4747.{os.getpid()}", f"slow_code_{len(launcher)}"
    (tmp_path / f"{module}.py").write_text(
        textwrap.dedent(f"""
            import pathlib, subprocess
            from ase.calculators.calculator import Calculator, all_changes

            class SlowCode(Calculator):
                implemented_properties = ["energy", "forces", "stress"]

                def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
                    program = subprocess.Popen({[*launcher, "sleep", seconds]!r})
                    pathlib.Path({str(tmp_path / "begun")!r}).write_text(str(program.pid))
                    program.wait()
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    method = relaxation_method(ASEPotential(calculator_name=f"{module}.SlowCode"), RelaxSettings())
    write_references(tmp_path / "references.json", ElementalReferences(method=method.label, energies={29: 0.0}), method)
    evaluator = make_evaluator(
        f"{module}.SlowCode", references_path=tmp_path / "references.json", workers=1, limits=WorkerLimits(seconds=5)
    )
    try:
        (answer,) = evaluator.collect(evaluator.submit({"a": from_atoms(bulk("Cu"))}))
        assert answer.failure is Failure.TIMEOUT
        assert (tmp_path / "begun").exists(), "the program had begun"
        assert not sleeping(seconds)
    finally:
        evaluator.close()


CODE = """
    import os, pathlib, signal, subprocess, time
    import psutil
    from ase.calculators.emt import EMT

    class {name}(EMT):
        program = None

        def calculate(self, *args, **kwargs):
            super().calculate(*args, **kwargs)
            if {name}.program is None:
                {name}.program = subprocess.Popen({program!r})
                {then}
"""


def of_code(tmp_path: Path, name: str, program: list[str], then: str, *, seconds: float = 60.0) -> Evaluation:
    """What an evaluator with EMT answers for copper whose calculator starts a program once."""
    (tmp_path / f"{name.lower()}_code.py").write_text(textwrap.dedent(CODE.format(name=name, program=program, then=then)))
    calculator = f"{name.lower()}_code.{name}"
    method = relaxation_method(ASEPotential(calculator_name=calculator), RelaxSettings())
    write_references(tmp_path / "references.json", ElementalReferences(method=method.label, energies={29: 0.0}), method)
    evaluator = make_evaluator(
        calculator, references_path=tmp_path / "references.json", workers=1, limits=WorkerLimits(seconds=seconds)
    )
    try:
        (answer,) = evaluator.collect(evaluator.submit({"a": from_atoms(bulk("Cu"))}))
    finally:
        evaluator.close()
    return answer


@pytest.mark.parametrize(
    "launcher", [[], ["setsid", "-w"], ["setsid", "-f"]], ids=["in the group", "in a session", "forked twice"]
)
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV"])
def test_the_program_of_a_calculator_that_dies_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, launcher: list[str]
) -> None:
    seconds = f"4748.{os.getpid()}"
    monkeypatch.syspath_prepend(str(tmp_path))
    there = f"while not any(one.info['cmdline'] == ['sleep', '{seconds}'] for one in psutil.process_iter(['cmdline'])): time.sleep(0.05)"
    answer = of_code(
        tmp_path,
        f"Dying{how}{len(launcher)}{''.join(launcher)[-1:]}",
        [*launcher, "sleep", seconds],
        f"{there}\n                os.kill(os.getpid(), signal.{how})",
    )
    assert answer.failure is Failure.CRASHED
    assert how in answer.message
    assert not sleeping(seconds)


def test_what_a_program_that_still_runs_has_used_is_paid_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    burning = [sys.executable, "-c", "while True: pass"]
    answer = of_code(
        tmp_path, "Burning", burning, "while sum(psutil.Process(self.program.pid).cpu_times()[:2]) < 3.0: time.sleep(0.05)"
    )
    assert answer.converged
    assert answer.cost_seconds >= 3.0, "the calculator itself needs a tenth of a second"


def test_a_calculator_that_closes_what_is_not_its_own_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dft_stub.workers._LAST_SECONDS", 0.5)
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = of_code(tmp_path, "Closing", ["true"], "os.closerange(3, 100); time.sleep(3600)", seconds=600.0)
    assert answer.failure is Failure.CRASHED
    assert "it closed its connection and lived on" in answer.message


def test_folders_named_as_ours_do_not_shadow_the_worker(own_folder: Path) -> None:
    for name in ("pipelines", "flows", "gnome"):
        (own_folder / name).mkdir()
        (own_folder / name / "__init__.py").write_text("raise SystemExit('not the program')\n")
    with PyXtalStructures(workers=1) as structures:
        search = structures.search({11: 1, 17: 1}, n=1, seed=0)
    assert search.failures == ()
    assert [one.crystal.reduced_formula for one in search.structures] == ["NaCl"]
