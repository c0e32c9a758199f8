"""Relaxation: against ASE alone, gates on both sides, and the shipped seeds."""

from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE

from dft_stub.chgnet_calculator import check_sha256
from dft_stub.evaluator import Failure
from dft_stub.potentials import MPTRJ_ELEMENTS, CHGNetPotential
from dft_stub.references import shipped_references
from dft_stub.relaxer import RelaxSettings, relax, relaxation_method
from gnome.crystals.convert import from_atoms, to_atoms
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.shards import read_shard
from gnome.errors import EvaluatorUnavailable
from gnome.shipped import shipped_data

STRAINED = from_atoms(bulk("Cu", "fcc", a=3.8) * (1, 1, 2))


def test_it_is_ases_relaxation_step_by_step() -> None:
    outcome = relax(STRAINED, EMT(), RelaxSettings(fmax=0.02))
    atoms = to_atoms(STRAINED)
    atoms.calc = EMT()
    optimizer = FIRE(FrechetCellFilter(atoms), logfile=None)
    optimizer.run(fmax=0.02, steps=400)
    assert outcome.converged, outcome.message
    assert outcome.n_steps == optimizer.nsteps
    assert outcome.crystal is not None
    assert np.allclose(outcome.crystal.lattice, np.asarray(atoms.cell), atol=1e-10)
    assert outcome.energy_per_atom == pytest.approx(atoms.get_potential_energy() / 2, abs=1e-9)
    assert outcome.stress is not None
    assert np.allclose(outcome.stress, atoms.get_stress(voigt=False) * 160.2176634, atol=1e-6)


def test_a_cell_that_was_strained_far_is_taken_up_again_until_it_is_converged_as_stored() -> None:
    """The filter's forces on a cell are those against its starting cell, so a first descent may end too early."""
    rng = np.random.default_rng(0)
    restarted = 0
    for symbol in ("Cu", "Au", "Pt", "Al", "Ag"):
        atoms = bulk(symbol, cubic=True)
        strain = np.eye(3) * rng.uniform(1.1, 1.5) + rng.normal(scale=0.12, size=(3, 3))
        atoms.set_cell(atoms.cell @ strain, scale_atoms=True)
        atoms.positions += rng.normal(scale=0.15, size=atoms.positions.shape)
        outcome = relax(from_atoms(atoms), EMT(), RelaxSettings(max_steps=800))
        assert outcome.converged, outcome.message
        assert outcome.max_force is not None
        assert outcome.max_force < 1.1 * RelaxSettings().fmax
        atoms.calc = EMT()
        optimizer = FIRE(FrechetCellFilter(atoms), logfile=None)
        optimizer.run(fmax=RelaxSettings().fmax, steps=800)
        restarted += outcome.n_steps > optimizer.nsteps
    assert restarted >= 1, "one of these needs a second descent, or this test shows nothing"


def test_positions_alone_keep_the_cell() -> None:
    moved = Crystal(STRAINED.lattice, STRAINED.atomic_numbers, STRAINED.frac_coords + np.array([[0, 0, 0], [0.02, 0, 0.01]]))
    outcome = relax(moved, EMT(), RelaxSettings(relax_cell=False))
    assert outcome.crystal is not None
    assert np.allclose(outcome.crystal.lattice, moved.lattice)
    assert outcome.stress is None


def test_steps_are_counted_and_an_unfinished_relaxation_says_so() -> None:
    outcome = relax(STRAINED, EMT(), RelaxSettings(max_steps=2))
    assert outcome.failure is Failure.NOT_CONVERGED
    assert outcome.n_steps == 2
    assert "after 2 steps" in outcome.message
    assert outcome.energy_per_atom is None


@pytest.mark.parametrize(
    ("crystal", "failure"),
    [
        (STRAINED.scaled(1e-6), Failure.REFUSED),
        (Crystal(STRAINED.lattice * np.nan, STRAINED.atomic_numbers, STRAINED.frac_coords), Failure.REFUSED),
        (Crystal(STRAINED.lattice, STRAINED.atomic_numbers, STRAINED.frac_coords * 0.01), Failure.REFUSED),
        (STRAINED.with_atomic_numbers([84, 84]), Failure.UNSUPPORTED_ELEMENT),
    ],
    ids=["tiny", "nan", "overlapping", "polonium"],
)
def test_gates_come_before_the_potential(crystal: Crystal, failure: Failure) -> None:
    outcome = relax(crystal, None, elements=MPTRJ_ELEMENTS)  # type: ignore[arg-type]  # no potential is asked
    assert outcome.failure is failure
    assert outcome.message


def test_the_method_names_what_changes_an_energy() -> None:
    potential = CHGNetPotential()
    label = relaxation_method(potential, RelaxSettings()).label
    assert label == relaxation_method(potential, RelaxSettings(max_steps=9)).label
    assert label != relaxation_method(potential, RelaxSettings(fmax=0.1)).label
    assert label == shipped_references().method


def test_chgnet_was_made_for_89_elements() -> None:
    assert len(MPTRJ_ELEMENTS) == 89
    assert {SYMBOLS[z] for z in range(1, 95)} - {SYMBOLS[z] for z in MPTRJ_ELEMENTS} == {"Po", "At", "Rn", "Fr", "Ra"}


def test_altered_weights_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"a pickle, perhaps")
    with pytest.raises(EvaluatorUnavailable, match="not loaded"):
        check_sha256(tmp_path / "weights", "0" * 64)
    with pytest.raises(EvaluatorUnavailable, match="cannot be read"):
        check_sha256(tmp_path / "absent", "0" * 64)


def test_shipped_seeds_are_relaxed_here_too() -> None:
    """A fresh relaxation through ASE alone gives the shipped energies to 2 meV/atom."""
    crystals, columns, metadata = read_shard(shipped_data() / "seeds.parquet")
    assert metadata["references"]["method"] == shipped_references().method
    calculator = CHGNetPotential().calculator()
    small = [number for number, crystal in enumerate(crystals) if crystal.n_atoms <= 6]
    for number in np.random.default_rng(0).choice(small, 5, replace=False):
        atoms = to_atoms(crystals[number])
        atoms.calc = calculator
        FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=0.03, steps=400)
        energy = float(atoms.get_potential_energy()) / len(atoms)
        assert energy == pytest.approx(columns["energy_per_atom"][number], abs=2e-3), columns["source"][number]
