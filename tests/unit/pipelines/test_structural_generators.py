from itertools import combinations

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher

from gnome.crystals.convert import to_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.identity import same_crystal
from gnome.crystals.shards import read_shard
from gnome.crystals.validity import is_valid
from gnome.shipped import shipped_data
from pipelines.contacts import shortest_contacts, smallest_length_factor
from pipelines.contract import validate_generator
from pipelines.oxidation import OXYGEN_BOND, can_be_neutral, is_salt
from pipelines.screening import Prediction
from pipelines.selection import select
from pipelines.structural import IonicSubstitution, PartialSubstitution, StructuralSettings, Taken
from pipelines.substitution import SubstitutionSettings
from pipelines.symmetry import GroupingLimits, SiteGroupings, site_symmetry
from pipelines.volumes import fit_atomic_volumes, radii_volumes

SEEDS = read_shard(shipped_data() / "seeds.parquet")[0]
GENERATORS = [IonicSubstitution(), PartialSubstitution()]


@pytest.mark.parametrize("generator", GENERATORS, ids=lambda generator: generator.name)
class TestBothGenerators:
    def test_contract(self, generator, known_crystals):
        validate_generator(generator, known_crystals[:25], limit=60)

    def test_parents_take_turns(self, generator, known_crystals):
        parents = known_crystals[:12]
        proposed = list(generator.propose(parents, limit=36, seed=0))
        counts = np.unique([candidate.lineage.parent_id for candidate in proposed], return_counts=True)[1]
        assert len(counts) >= 10
        assert counts.max() <= 5

    def test_what_is_offered_does_not_depend_on_the_order_of_the_parents(self, generator, known_crystals):
        parents = known_crystals[:10]
        forward = [candidate.id for candidate in generator.propose(parents, limit=40, seed=3)]
        backward = [candidate.id for candidate in generator.propose([*parents[::-1], parents[0]], limit=40, seed=3)]
        assert forward == backward

    def test_seeds_differ(self, generator, rocksalt):
        first, second = ([c.id for c in generator.propose([rocksalt()], limit=20, seed=seed)] for seed in (1, 2))
        assert first != second

    def test_known_compositions_are_skipped(self, generator, rocksalt):
        everything = {c.crystal.reduced_formula for c in generator.propose([rocksalt()], limit=10_000, seed=0)}
        known = frozenset(sorted(everything)[::2])
        left = {
            c.crystal.reduced_formula for c in type(generator)(known_formulas=known).propose([rocksalt()], limit=10_000, seed=0)
        }
        assert left == everything - known
        assert "NaCl" not in everything

    def test_only_chosen_elements_are_put_in(self, generator, rocksalt):
        chosen = type(generator)(substitution=SubstitutionSettings(elements=frozenset({19, 37}), max_replaced=1))
        proposed = list(chosen.propose([rocksalt()], limit=100, seed=0))
        assert proposed
        assert all(set(c.crystal.composition) <= {11, 17, 19, 37} for c in proposed)

    def test_children_of_given_elements_alone(self, generator, known_crystals):
        wanted = frozenset({3, 8, 11, 16, 22, 26})
        chosen = type(generator)(settings=StructuralSettings(elements=wanted))
        proposed = list(chosen.propose(known_crystals, limit=50, seed=0))
        assert len(proposed) == 50
        assert all(set(c.crystal.composition) <= wanted for c in proposed)

    def test_bounds_on_parents_and_children(self, generator, known_crystals):
        bounded = type(generator)(settings=StructuralSettings(max_atoms=4, max_elements=2))
        proposed = list(bounded.propose(known_crystals, limit=200, seed=0))
        assert proposed
        assert all(c.crystal.n_atoms <= 4 and len(c.crystal.composition) == 2 for c in proposed)

    def test_bad_parents_are_passed_over(self, generator, rocksalt):
        overlapping = Crystal.from_symbols(4 * np.eye(3), ["K", "Br"], [[0, 0, 0], [0.01, 0, 0]])
        good = [c.crystal.id for c in generator.propose([rocksalt()], limit=10, seed=0)]
        both = [c.crystal.id for c in generator.propose([overlapping, rocksalt()], limit=10, seed=0)]
        assert good == both
        assert list(generator.propose([], limit=10, seed=0)) == []


def test_whole_substitution_keeps_the_sites_and_rescales_the_cell(rocksalt):
    parents = [rocksalt(), rocksalt("K", "Br", 6.60), rocksalt("Mg", "O", 4.21), rocksalt("Rb", "I", 7.34)]
    by_id = {parent.id: parent for parent in parents}
    proposed = list(IonicSubstitution().propose(parents, limit=10_000, seed=0))
    for candidate in proposed:
        parent = by_id[candidate.lineage.parent_id]
        np.testing.assert_array_equal(candidate.crystal.frac_coords, parent.frac_coords)
        factor = candidate.lineage.parameters["volume_factor"]
        np.testing.assert_allclose(candidate.crystal.lattice, parent.lattice * factor ** (1 / 3), rtol=1e-12)
        assert len(candidate.crystal.composition) == len(parent.composition)
    rubidium_bromide = next(c.crystal for c in proposed if c.crystal.reduced_formula == "RbBr")
    assert rubidium_bromide.volume ** (1 / 3) == pytest.approx(6.85, rel=0.08)  # measured lattice constant


def test_isotypic_parents_offer_a_child_once(rocksalt):
    parents = [rocksalt(), rocksalt("K", "Br", 6.60)]
    formulas = [c.crystal.reduced_formula for c in IonicSubstitution().propose(parents, limit=10_000, seed=0)]
    assert len(set(formulas)) == len(formulas)
    assert "KCl" in formulas  # both could have offered it


def test_alike_sites_give_one_crystal_when_swapped():
    caesium_chloride = Crystal.from_symbols(4.12 * np.eye(3), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    formulas = [c.crystal.reduced_formula for c in IonicSubstitution().propose([caesium_chloride], limit=10_000, seed=0)]
    assert len(set(formulas)) == len(formulas)


def test_partial_substitution_replaces_the_sites_it_names(rocksalt):
    parent = rocksalt()
    proposed = list(PartialSubstitution().propose([parent], limit=400, seed=0))
    levels = set()
    for candidate in proposed:
        parameters = candidate.lineage.parameters
        changed = np.flatnonzero(candidate.crystal.atomic_numbers != parent.atomic_numbers)
        assert changed.tolist() == parameters["sites"]
        assert {parent.symbols[i]: candidate.crystal.symbols[i] for i in changed} == parameters["replaced"]
        levels.add(len(changed))
    assert levels == {1, 2, 3, 4}


def brute_force_counts(parent: Crystal, sites: np.ndarray, z: int) -> list[int]:
    """Distinct crystals at each level, by comparing every decoration with every other."""
    matcher = StructureMatcher(ltol=0.01, stol=0.02, angle_tol=0.5, scale=False, primitive_cell=True)
    counts = []
    for level in range(1, len(sites) + 1):
        children = []
        for subset in combinations(sites, level):
            numbers = parent.atomic_numbers.copy()
            numbers[list(subset)] = z
            children.append(to_structure(parent.with_atomic_numbers(numbers)))
        counts.append(len(matcher.group_structures(children)))
    return counts


def test_groupings_are_those_of_brute_force_on_twenty_seeds(known_crystals):
    checked, levels_with_choice = 0, 0
    for parent in known_crystals:
        suitable = [z for z, count in parent.composition.items() if 2 <= count <= 4]
        if not suitable or parent.n_atoms > 10:
            continue
        z = suitable[checked % len(suitable)]
        sites = np.flatnonzero(parent.atomic_numbers == z)
        newcomer = next(new for new in (79, 47, 29) if new not in parent.composition)
        groupings = SiteGroupings(sites, site_symmetry(parent).permutations)
        ours = [len(groupings.orbits(level)) for level in range(1, len(sites) + 1)]
        assert ours == brute_force_counts(parent, sites, newcomer), parent.reduced_formula
        checked += 1
        levels_with_choice += sum(count > 1 for count in ours)
        if checked == 20:
            break
    assert checked == 20
    assert levels_with_choice >= 5


def test_groupings_of_a_cell_with_six_and_with_eight_sites():
    """Conventional fluorite, CaF2: 4 calcium and 8 fluorine sites; the fluorine sublattice is a simple cube, 2x2x2."""
    calcium = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    fluorine = [[x, y, z] for x in (0.25, 0.75) for y in (0.25, 0.75) for z in (0.25, 0.75)]
    crystal = Crystal.from_symbols(5.46 * np.eye(3), ["Ca"] * 4 + ["F"] * 8, [*calcium, *fluorine])
    symmetry = site_symmetry(crystal)
    assert symmetry.space_group_number == 225
    groupings = SiteGroupings(np.arange(4, 12), symmetry.permutations)
    counts = [len(groupings.orbits(level)) for level in range(1, 9)]
    assert counts == [1, 3, 3, 6, 3, 3, 1, 1]  # subsets of the periodic 2x2x2 cube up to its symmetry
    assert [len(SiteGroupings(np.arange(4), symmetry.permutations).orbits(level)) for level in (1, 2, 3, 4)] == [1, 1, 1, 1]


def test_too_many_groupings_are_sampled_without_repeats():
    rng = np.random.default_rng(0)
    crystal = Crystal(9 * np.eye(3), np.full(20, 26), rng.random((20, 3)))
    groupings = SiteGroupings(np.arange(20), site_symmetry(crystal).permutations)
    limits = GroupingLimits(max_enumerated=100, n_samples=50, max_per_level=12)
    chosen = groupings.choose(10, limits, np.random.default_rng(1))
    again = groupings.choose(10, limits, np.random.default_rng(1))
    np.testing.assert_array_equal(chosen, again)
    assert chosen.shape == (12, 20)
    assert (chosen.sum(axis=1) == 10).all()
    assert len(np.unique(groupings.canonical(chosen))) == 12
    assert len(groupings.choose(1, limits, np.random.default_rng(1))) == 12  # 20 orbits, cut down
    with pytest.raises(ValueError, match="at most 62"):
        SiteGroupings(np.arange(63), np.arange(63)[None, :])


def test_fast_gate_agrees_with_the_geometric_gate(known_crystals):
    rng = np.random.default_rng(0)
    verdicts = []
    for crystal in known_crystals[:60]:
        numbers = rng.choice([1, 6, 14, 55, 87], crystal.n_atoms)
        factor = rng.uniform(0.5, 1.5)
        fast = smallest_length_factor(shortest_contacts(crystal), numbers) <= factor ** (1 / 3)
        verdicts.append(fast)
        assert fast == is_valid(crystal.with_atomic_numbers(numbers).scaled(factor))
    assert {True, False} == set(verdicts)


def test_atomic_volumes_follow_known_crystals_and_fall_back_on_radii(rocksalt):
    salts = [rocksalt(), rocksalt("K", "Cl", 6.29), rocksalt("Na", "Br", 5.97), rocksalt("K", "Br", 6.60)] * 5
    volumes = fit_atomic_volumes(salts)
    for salt in salts:
        assert volumes[salt.atomic_numbers].sum() == pytest.approx(salt.volume, rel=0.05)
    assert volumes[79] == pytest.approx(radii_volumes()[79])
    np.testing.assert_array_equal(fit_atomic_volumes([]), radii_volumes())
    assert (volumes > 0).all()


def numbers_of(symbols: str) -> frozenset[int]:
    return frozenset(SYMBOLS.index(symbol) for symbol in symbols.split())


PEROVSKITE = Crystal.from_symbols(
    3.905 * np.eye(3), ["Sr", "Ti", "O", "O", "O"], [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
)
ALLOY = Crystal.from_symbols(2.89 * np.eye(3), ["Ni", "Al"], [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.fixture(scope="module")
def seeds() -> list[Crystal]:
    """The shipped seeds of at most eight atoms."""
    crystals, _, _ = read_shard(shipped_data() / "seeds.parquet")
    return [crystal for crystal in crystals if crystal.n_atoms <= 8]


@pytest.fixture(scope="module")
def halides(seeds: list[Crystal]) -> tuple[list[Crystal], dict[str, object]]:
    """Seeds that can become halides of three metals, and the generators' common arguments for these."""
    wanted = numbers_of("Ca Sr Y Cl Br I")
    parents = [seed for seed in seeds if set(seed.composition) & numbers_of("F Cl Br I") and len(seed.composition) <= 3]
    return parents, {
        "known_formulas": frozenset(seed.reduced_formula for seed in seeds),
        "settings": StructuralSettings(max_atoms=20, elements=wanted),
    }


def both(parents, given, taken: Taken | None):
    partial = list(PartialSubstitution(**given).propose(parents, limit=3000, seed=5, taken=taken))
    return partial, list(IonicSubstitution(**given).propose(parents, limit=3000, seed=5, taken=taken))


def test_the_generators_of_a_round_share_no_crystal(halides):
    alone = both(*halides, None)
    partial, ionic = both(*halides, {})
    common = {c.crystal.id for c in alone[0]} & {c.crystal.id for c in alone[1]}
    assert len(common) > 20, "alone, both would make these"
    assert [c.id for c in partial] == [c.id for c in alone[0]], "the first is not held back"
    assert ionic
    assert not {c.crystal.id for c in partial} & {c.crystal.id for c in ionic}
    formulas = {c.crystal.reduced_formula for c in partial + ionic}
    assert formulas == {c.crystal.reduced_formula for c in alone[0] + alone[1]}, "and no composition is lost"


def test_a_generator_that_is_asked_again_offers_the_same(halides):
    """As an interrupted round does, with what was taken before at hand or not."""
    parents, given = halides
    generator, taken = PartialSubstitution(**given), {}
    first = [c.id for c in generator.propose(parents, limit=60, seed=5, taken=taken)]
    assert len(first) == 60
    assert first == [c.id for c in generator.propose(parents, limit=60, seed=5, taken=taken)]


def test_no_crystal_is_chosen_twice_where_compositions_are_fewer_than_the_budget(halides):
    partial, ionic = both(*halides, None)
    candidates = partial[:60] + [c for c in ionic if c.crystal.id in {p.crystal.id for p in partial[:60]}]
    assert len(candidates) > len({c.crystal.id for c in candidates}) > 40
    predictions = [
        Prediction(
            candidate_id=c.id, e_form_per_atom=-1.0, spread=0.0, volume_scale=1.0, model_id="m", method="x",
            decomposition_energy=int(c.crystal.id[:4], 16) / 65536, n_competing=1,
        )
        for c in candidates
    ]  # fmt: skip
    chosen = [one.candidate.crystal for one in select(predictions, candidates, 1000)]
    assert len({crystal.reduced_formula for crystal in chosen}) == len({c.crystal.reduced_formula for c in candidates})
    for i, crystal in enumerate(chosen):
        alike = [other for other in chosen[:i] if other.reduced_formula == crystal.reduced_formula]
        assert not any(same_crystal(crystal, other) for other in alike)


@pytest.mark.parametrize("generator", [IonicSubstitution, PartialSubstitution])
@pytest.mark.parametrize(
    ("parent", "elements"),
    [(PEROVSKITE, "Sr Ti O Ca Ba Zr S F"), (PEROVSKITE, "Ti O Ca Ba Eu Pb Zr"), (ALLOY, "Ni Al Cu Fe Ga Co")],
    ids=["SrTiO3", "SrTiO3 without Sr", "NiAl"],
)
def test_elements_that_are_handed_down_change_no_proposal(generator, parent, elements):
    wanted = numbers_of(elements)
    free = [c for c in generator().propose([parent], limit=100_000, seed=1) if set(c.crystal.composition) <= wanted]
    bounded = list(generator(settings=StructuralSettings(elements=wanted)).propose([parent], limit=100_000, seed=1))
    assert len(free) > 2
    assert {c.crystal.id for c in bounded} == {c.crystal.id for c in free}
    assert {c.id for c in bounded} == {c.id for c in free}, "their lineage included"


@pytest.mark.parametrize("generator", [IonicSubstitution, PartialSubstitution])
class TestChargeBalance:
    def children(self, generator, parent, **settings):
        proposed = generator(settings=StructuralSettings(**settings)).propose([parent], limit=100_000, seed=0)
        return {c.crystal.id: c for c in proposed}

    def test_a_parent_whose_charges_cancel_has_no_child_whose_charges_cannot(self, generator, rocksalt):
        for parent in (rocksalt(), PEROVSKITE):
            strict = self.children(generator, parent)
            assert len(strict) > 10
            assert all(can_be_neutral(c.crystal.composition) for c in strict.values())
            assert not any("charge_balanced" in c.lineage.parameters for c in strict.values())

    def test_where_others_are_let_through_they_are_marked(self, generator, rocksalt):
        strict = self.children(generator, rocksalt())
        free = self.children(generator, rocksalt(), charge_balanced=False)
        others = [c for identifier, c in free.items() if identifier not in strict]
        assert len(others) > 10
        for candidate in free.values():
            balanced = can_be_neutral(candidate.crystal.composition)
            assert candidate.lineage.parameters.get("charge_balanced", True) is balanced
        assert {c.crystal.reduced_formula for c in strict.values()} <= {c.crystal.reduced_formula for c in free.values()}

    @pytest.mark.parametrize(
        "formula", ["KO2", "Na2O2", "KClO3", "SrFeO3", "TaO", "UO", "B6O", "K2MnO4", "CaO2", "TiO2", "NaCl", "Ca3SnO"]
    )
    def test_no_seed_has_an_oxide_or_halide_for_a_child_whose_charges_cannot_cancel(self, generator, formula):
        parents = [seed for seed in SEEDS if seed.reduced_formula == formula]
        assert parents
        for parent in parents:
            for candidate in self.children(generator, parent).values():
                crystal = candidate.crystal
                oxygen = np.flatnonzero(crystal.atomic_numbers == 8)
                pairs = oxygen.size and shortest_contacts(crystal)[np.ix_(oxygen, oxygen)].min() < OXYGEN_BOND
                assert not is_salt(crystal.composition) or can_be_neutral(crystal.composition, oxygen_pairs=bool(pairs)), (
                    crystal.reduced_formula
                )

    def test_peroxides_have_peroxides_for_children(self, generator):
        (peroxide,) = [seed for seed in SEEDS if seed.reduced_formula == "Na2O2"]
        children = {c.crystal.reduced_formula for c in self.children(generator, peroxide).values()}
        assert {"K2O2", "Li2O2"} <= children
        assert not {"NaF2", "KF2", "TaF"} & children

    def test_intermetallics_are_free(self, generator):
        assert not can_be_neutral(ALLOY.composition)
        strict, free = self.children(generator, ALLOY), self.children(generator, ALLOY, charge_balanced=False)
        assert len(strict) > 10
        others = [c for identifier, c in free.items() if identifier not in strict]
        assert all(is_salt(c.crystal.composition) for c in others), "an oxide is no intermetallic whatever it was made from"
        assert not all(can_be_neutral(c.crystal.composition) for c in strict.values())
        assert [c for c in free.values() if "charge_balanced" in c.lineage.parameters] == others
