import sys
import textwrap
import time

import numpy as np
import pytest

from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import parse_formula
from gnome.crystals.validity import is_valid
from gnome.processes import LineWorker, ProcessLost
from pipelines.contract import validate_random_structures
from pipelines.pyxtal_structures import PyXtalStructures
from pipelines.random_structures import RandomStructureSettings, draw_volume, stream
from pipelines.volumes import estimated_volume


@pytest.fixture(scope="module")
def pyxtal_structures():
    with PyXtalStructures() as structures:
        yield structures


def test_contract(pyxtal_structures):
    search = validate_random_structures(pyxtal_structures, parse_formula("SrTiO3"), pyxtal_structures.settings)
    assert len(search.structures) == 4
    assert len({structure.space_group_number for structure in search.structures}) > 1


def test_structures_depend_neither_on_what_was_asked_before_nor_on_the_number_of_workers(pyxtal_structures):
    composition = parse_formula("TiO2")
    first = pyxtal_structures.search(composition, n=2, seed=3)
    pyxtal_structures.search(parse_formula("NaCl"), n=2, seed=3)
    again = pyxtal_structures.search(composition, n=2, seed=3)
    with PyXtalStructures(workers=3) as fresh:
        anew = fresh.search(composition, n=7, seed=3)
    assert [structure.index for structure in anew.structures] == list(range(7))
    ids = [structure.crystal.id for structure in first.structures]
    assert ids == [structure.crystal.id for structure in again.structures]
    assert ids == [structure.crystal.id for structure in anew.structures[:2]]


def test_formula_that_is_too_large_is_reported(pyxtal_structures):
    search = pyxtal_structures.search(parse_formula("Mg17Al12"), n=3, seed=0)
    assert search.structures == ()
    assert search.failures == ("Mg17Al12: 29 atoms, the limit is 20",)


def test_volume_is_drawn_from_what_the_gate_leaves():
    settings = RandomStructureSettings()
    crystal = Crystal(3 * np.eye(3), [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])
    estimate = estimated_volume(crystal.composition, settings.volumes)
    rng = np.random.default_rng(0)
    factors = []
    for _ in range(200):
        rescaled, factor = draw_volume(crystal, settings, rng)
        assert rescaled.volume == pytest.approx(factor * estimate)
        assert is_valid(rescaled, settings.gate)
        factors.append(factor)
    assert min(factors) < 0.45
    assert max(factors) > 1.15
    assert np.mean(factors) == pytest.approx(0.8, abs=0.05)
    needle = Crystal(np.diag([1.5, 1.5, 40.0]), [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert draw_volume(needle, settings, rng) is None


def test_settings_survive_their_record():
    settings = RandomStructureSettings(max_atoms=7)
    rebuilt = RandomStructureSettings.from_dict(settings.to_dict())
    assert rebuilt == settings
    np.testing.assert_array_equal(rebuilt.volumes, settings.volumes)
    assert [list(RandomStructureSettings().formula_units({3: n})) for n in (1, 6, 10, 21)] == [
        [1, 2, 3, 4],
        [1, 2, 3],
        [1, 2],
        [],
    ]


def test_streams_differ_by_seed_formula_and_index():
    base = stream({3: 1, 8: 2}, 0, 0).integers(2**31)
    assert base == stream({8: 2, 3: 1}, 0, 0).integers(2**31)
    others = [stream({3: 1, 8: 2}, 1, 0), stream({3: 1, 8: 2}, 0, 1), stream({3: 2, 8: 1}, 0, 0)]
    assert base not in [rng.integers(2**31) for rng in others]


def fake(tmp_path, answer: str) -> list[str]:
    """A worker that takes the settings and then does what `answer` says with each `question`; it counts its starts."""
    script = tmp_path / "fake.py"
    script.write_text(
        "import json, os, sys, time\n"
        f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\n"
        "sys.stdin.readline()\n"
        "print(json.dumps({'ready': True}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    question = json.loads(line)\n" + textwrap.indent(textwrap.dedent(answer), "    ")
    )
    return [sys.executable, str(script)]


GOOD = """
record = {'crystal': {'lattice': [[4, 0, 0], [0, 4, 0], [0, 0, 4]], 'atomic_numbers': [3], 'frac_coords': [[0, 0, 0]]},
          'index': question['index'], 'space_group_number': 221, 'formula_units': 1, 'volume_factor': 1.0}
print(json.dumps(record), flush=True)
"""
BAD = {
    "hang": ("time.sleep(60)", "gave no answer within 0.5 s"),
    "crash": ("os._exit(7)", "ended with exit code 7"),
    "abort": ("os.abort()", "ended with exit code -6"),
    "garbage": ("print('Segmentation fault (core dumped)', flush=True)", "answered with something that is no JSON"),
    "list": ("print('[1, 2]', flush=True)", "answered with something that is no JSON object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_formula_costs_itself_alone(tmp_path, kind):
    """The worker fails on every structure of NaCl and serves lithium."""
    action, message = BAD[kind]
    command = fake(tmp_path, f"if len(question['composition']) == 2:\n    {action}\n    continue\n" + textwrap.dedent(GOOD))
    settings = RandomStructureSettings(time_limit=0.5, max_losses=2)
    with PyXtalStructures(settings, command=command) as structures:
        before = structures.search({3: 1}, n=3, seed=0)
        started = time.monotonic()
        bad = structures.search(parse_formula("NaCl"), n=5, seed=0)
        took = time.monotonic() - started
        after = structures.search({3: 1}, n=3, seed=0)
    assert bad.structures == ()
    assert bad.failures == (
        f"NaCl, structure 0: the generator {message}",
        f"NaCl, structure 1: the generator {message}",
        "NaCl: given up after 2 losses",
    )
    assert took < 15
    assert len(before.structures) == len(after.structures) == 3
    assert before.failures == after.failures == ()
    assert len((tmp_path / "starts").read_text()) == 3  # once at first, and once after each loss


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_memory_is_limited(tmp_path):
    command = fake(tmp_path, "x = bytearray(3 * 2**30)\n" + textwrap.dedent(GOOD))
    with PyXtalStructures(RandomStructureSettings(memory_limit=1024, max_losses=1), command=command) as structures:
        search = structures.search({3: 1}, n=2, seed=0)
    assert search.structures == ()
    assert search.failures[0] == "Li, structure 0: the generator ended with exit code 1"


def test_structures_that_never_pass_are_reported(tmp_path):
    with PyXtalStructures(command=fake(tmp_path, "print('{}', flush=True)\n")) as structures:
        search = structures.search({3: 1}, n=2, seed=0)
    assert search.structures == ()
    assert search.failures[1] == "Li, structure 1: nothing passed the gate in 30 attempts"


def test_worker_that_cannot_start_and_closing_twice(tmp_path):
    worker = LineWorker([sys.executable, "-c", "raise SystemExit(3)"], memory_bytes=2**32)
    with pytest.raises(ProcessLost, match="exit code 3"):
        worker.ask({"a": 1}, seconds=20)
    worker.close()
    worker.close()


def test_an_interruption_is_not_held_up_by_what_is_being_drawn(tmp_path, monkeypatch):
    structures = PyXtalStructures(workers=2, command=fake(tmp_path, "time.sleep(20)\nprint('{}', flush=True)\n"))

    def interrupted(_):
        time.sleep(2)
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), structures:
        structures.search({3: 1}, n=20, seed=0)
    assert time.monotonic() - started < 15
