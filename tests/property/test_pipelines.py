"""What must hold for any crystal, composition or prediction, not only for those somebody thought of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pymatgen.core import Lattice, Structure

from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import check_crystal
from pipelines.candidate import Candidate, Lineage
from pipelines.compositions import is_balanced
from pipelines.contacts import shortest_contacts
from pipelines.offset import fit_residuals
from pipelines.screening import Prediction
from pipelines.selection import GreedyAcquisition, RandomAcquisition, SelectionSettings, select
from pipelines.structural import IonicSubstitution, PartialSubstitution
from pipelines.substitution import SubstitutionSettings, likely_substitutions, load_table
from pipelines.symmetry import GroupingLimits, SiteGroupings, site_symmetry

SEEDS = st.integers(0, 2**31)
COMPOSITIONS = st.dictionaries(st.integers(1, 94), st.integers(1, 8), min_size=1, max_size=4)


def random_crystal(seed: int, n_atoms: int, elements=(8, 14, 26)) -> Crystal:
    rng = np.random.default_rng(seed)
    lattice = rng.normal(size=(3, 3)) * 0.7 + np.diag(rng.uniform(3, 8, 3))
    return Crystal(lattice, rng.choice(elements, n_atoms), rng.random((n_atoms, 3)))


@given(seed=SEEDS, n_atoms=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_shortest_contacts_are_those_of_all_neighbours(seed, n_atoms):
    crystal = random_crystal(seed, n_atoms)
    structure = Structure(Lattice(crystal.lattice), crystal.symbols, crystal.frac_coords)
    expected = np.full((n_atoms, n_atoms), np.inf)
    for i, neighbours in enumerate(structure.get_all_neighbors(4.5, include_index=True)):
        for neighbour in neighbours:
            expected[i, neighbour.index] = min(expected[i, neighbour.index], neighbour.nn_distance)
    ours = shortest_contacts(crystal, reach=4.5)
    within = expected < 4.5
    np.testing.assert_allclose(ours[within], expected[within], atol=1e-8)
    assert (ours[~within] >= 4.5 - 1e-8).all()


@given(seed=SEEDS, repeats=st.sampled_from([(1, 1, 2), (2, 2, 1), (2, 2, 2)]))
@settings(max_examples=20, deadline=None)
def test_orbits_partition_the_subsets(seed, repeats):
    """On supercells of a one-atom cell: representatives are inequivalent, and their orbits hold every subset once."""
    rng = np.random.default_rng(seed)
    grid = np.array(list(np.ndindex(repeats))) / np.array(repeats)
    edges = rng.choice([2.5, 3.0], 3) * np.array(repeats)
    crystal = Crystal(np.diag(edges), np.full(len(grid), 29), (grid + rng.random(3)) % 1.0)
    permutations = site_symmetry(crystal).permutations
    groupings = SiteGroupings(np.arange(len(grid)), permutations)
    covered = set()
    for level in range(len(grid) + 1):
        for representative in groupings.orbits(level):
            orbit = {tuple(sorted(row)) for row in permutations[:, np.flatnonzero(representative)].tolist()}
            assert not orbit & covered
            covered |= orbit
    assert len(covered) == 2 ** len(grid)


@given(seed=SEEDS, level=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_chosen_groupings_have_the_level_and_are_inequivalent(seed, level):
    crystal = random_crystal(seed, 12, elements=(26,))
    groupings = SiteGroupings(np.arange(12), site_symmetry(crystal).permutations)
    limits = GroupingLimits(max_enumerated=50, n_samples=30, max_per_level=5)
    chosen = groupings.choose(level, limits, np.random.default_rng(seed))
    assert 1 <= len(chosen) <= 5
    assert (chosen.sum(axis=1) == level).all()
    assert len(np.unique(groupings.canonical(chosen))) == len(chosen)


@pytest.mark.parametrize("generator", [IonicSubstitution(), PartialSubstitution()], ids=lambda generator: generator.name)
@given(seed=SEEDS, n_atoms=st.integers(1, 8))
@settings(max_examples=15, deadline=None)
def test_any_parent_gives_valid_children_or_none(generator, seed, n_atoms):
    parent = random_crystal(seed, n_atoms)
    for candidate in generator.propose([parent], limit=5, seed=seed):
        check_crystal(candidate.crystal)
        assert candidate.lineage.parent_id == parent.id
        assert candidate.crystal.n_atoms == parent.n_atoms


@given(composition=COMPOSITIONS, states=st.dictionaries(st.integers(1, 94), st.floats(-4, 7), max_size=4))
@settings(max_examples=40, deadline=None)
def test_substitutions_pass_the_threshold_whatever_the_states(composition, states):
    table = load_table()
    found = likely_substitutions(composition, states, table, SubstitutionSettings(threshold=2e-3, max_replaced=2))
    assert found
    for substitution in found:
        assert substitution.probability > 2e-3
        assert 1 <= len(substitution.replaced) <= 2
        assert substitution.replaced.keys() <= composition.keys()
        after = [substitution.replaced.get(z, z) for z in composition]
        assert len(set(after)) == len(after)


@given(composition=COMPOSITIONS, factor=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_balance_does_not_depend_on_the_size_and_grows_with_freedom(composition, factor):
    verdicts = [is_balanced(composition, max_between=k) for k in (0, 1, 2)]
    assert verdicts == sorted(verdicts)
    multiplied = {z: n * factor for z, n in composition.items()}
    assert [is_balanced(multiplied, max_between=k) for k in (0, 1, 2)] == verdicts


@given(energies=st.lists(st.floats(-1, 1), min_size=1, max_size=12), budget=st.integers(0, 15), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_selection_keeps_the_budget_and_takes_a_prefix_of_the_ranking(energies, budget, seed):
    candidates, predictions = [], []
    for i, energy in enumerate(energies):
        crystal = Crystal(4 * np.eye(3), [3 + i // 2], [[0.1 * (i % 2), 0, 0]])
        candidates.append(Candidate(crystal=crystal, lineage=Lineage(generator="by_hand", parent_id=None)))
        predictions.append(
            Prediction(
                candidate_id=candidates[-1].id,
                e_form_per_atom=0.0,
                spread=0.0,
                volume_scale=1.0,
                model_id="m",
                method="x",
                decomposition_energy=energy,
            )
        )
    for acquisition in (GreedyAcquisition(), RandomAcquisition(seed=seed)):
        ranking = SelectionSettings(acquisition=acquisition)
        everything = select(predictions, candidates, 100, ranking)
        assert select(predictions, candidates, budget, ranking) == everything[:budget]
        assert len(everything) == len({candidate.crystal.reduced_formula for candidate in candidates})


@given(
    residuals=arrays(np.float64, 6, elements=st.floats(-2, 2)),
    shift=st.floats(-1, 1),
    ridge=st.floats(0.1, 10),
)
@settings(max_examples=40, deadline=None)
def test_a_constant_error_is_taken_off_completely(residuals, shift, ridge):
    compositions = [{3: 1, 8: 2}, {11: 1, 17: 1}, {26: 2, 8: 3}, {3: 1}, {14: 1, 8: 2}, {19: 1, 35: 1}]
    labels = {"model_id": "m", "from_method": "a", "to_method": "b", "ridge": ridge}
    base = fit_residuals(compositions, residuals, **labels)
    moved = fit_residuals(compositions, residuals + shift, **labels)
    for composition in [*compositions, {92: 1}]:
        assert moved.correction(composition) - base.correction(composition) == pytest.approx(shift, abs=1e-6)
