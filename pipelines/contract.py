"""What every generator and every source of random structures must keep to; each one's test calls these."""

from collections.abc import Mapping, Sequence

from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import reduced_formula
from gnome.crystals.validity import check_crystal
from pipelines.candidate import Candidate, Generator
from pipelines.random_structures import RandomSearch, RandomStructures, RandomStructureSettings
from pipelines.volumes import estimated_volume


def validate_generator(generator: Generator, parents: Sequence[Crystal], *, limit: int = 40, seed: int = 5) -> list[Candidate]:
    """Check a generator against the contract of `Generator` and return what it proposed.

    Raises AssertionError naming the promise that was broken, and InvalidCrystal for a candidate that fails the geometric gate.
    """
    before = [parent.to_dict() for parent in parents]
    proposed = list(generator.propose(parents, limit=limit, seed=seed))
    again = list(generator.propose(parents, limit=limit, seed=seed))
    ids = [candidate.id for candidate in proposed]
    _promise(proposed != [], "it proposes something")
    _promise(len(proposed) <= limit, f"at most {limit} candidates, got {len(proposed)}")
    _promise([candidate.id for candidate in again] == ids, "the same seed gives the same candidates in the same order")
    _promise([parent.to_dict() for parent in parents] == before, "parents are not changed")
    _promise(len({candidate.crystal.id for candidate in proposed}) == len(proposed), "no crystal is proposed twice")
    shorter = list(generator.propose(parents, limit=min(3, limit), seed=seed))
    _promise([candidate.id for candidate in shorter] == ids[: min(3, limit)], "a smaller limit gives the beginning")
    _promise(list(generator.propose(parents, limit=0, seed=seed)) == [], "a limit of 0 gives nothing")
    parent_ids = {parent.id for parent in parents}
    for candidate in proposed:
        check_crystal(candidate.crystal)
        lineage = candidate.lineage
        _promise(lineage.generator == generator.name, f"lineage names the generator, got {lineage.generator!r}")
        _promise(lineage.seed == seed, f"lineage holds the seed, got {lineage.seed}")
        _promise(
            lineage.parent_id in parent_ids or lineage.parent_id is None, f"the parent {lineage.parent_id} is one of those given"
        )
        _promise(bool(lineage.parameters), "lineage holds parameters")
        _promise(_is_json(lineage.parameters), f"parameters are JSON values, got {lineage.parameters}")
        _promise(Candidate.from_dict(candidate.to_dict()).id == candidate.id, "a candidate survives its record")
    return proposed


def validate_random_structures(
    structures: RandomStructures, composition: Mapping[int, int], settings: RandomStructureSettings, *, n: int = 4, seed: int = 5
) -> RandomSearch:
    """Check a source of random structures against the contract of `RandomStructures` and return what it found.

    `settings` are those it was made with.  Raises AssertionError naming the promise that was broken.
    """
    before = dict(composition)
    search = structures.search(composition, n=n, seed=seed)
    _promise(dict(composition) == before, "the composition is not changed")
    _promise(0 < len(search.structures) <= n, f"1 to {n} structures, got {len(search.structures)}: {search.failures}")
    _promise(structures.search(composition, n=0, seed=seed).structures == (), "none when none is asked for")
    indices = [structure.index for structure in search.structures]
    _promise(indices == sorted(set(indices)) and set(indices) <= set(range(n)), f"indices 0 to {n - 1}, got {indices}")
    if structures.is_reproducible:
        again = structures.search(composition, n=n, seed=seed)
        _promise(_ids(again) == _ids(search), "the same seed gives the same structures")
        fewer = structures.search(composition, n=1, seed=seed)
        _promise(
            _ids(fewer) == [name for name, i in zip(_ids(search), indices, strict=True) if i == 0], "draws do not depend on n"
        )
        other = structures.search(composition, n=n, seed=seed + 1)
        _promise(_ids(other) != _ids(search), "another seed gives other structures")
    for structure in search.structures:
        crystal = structure.crystal
        check_crystal(crystal, settings.gate)
        _promise(crystal.reduced_formula == reduced_formula(composition), f"the formula asked for, got {crystal.reduced_formula}")
        _promise(crystal.n_atoms <= settings.max_atoms, f"at most {settings.max_atoms} atoms, got {crystal.n_atoms}")
        _promise(1 <= structure.formula_units <= settings.max_formula_units, f"{structure.formula_units} formula units drawn")
        _promise(1 <= structure.space_group_number <= 230, f"a space group, got {structure.space_group_number}")
        factor = crystal.volume / estimated_volume(crystal.composition, settings.volumes)
        _promise(
            abs(factor - structure.volume_factor) < 1e-5, f"volume is {factor} of the estimate, not {structure.volume_factor}"
        )
    structures.close()
    return search


def _ids(search: RandomSearch) -> list[str]:
    return [structure.crystal.id for structure in search.structures]


def _promise(kept: bool, what: str) -> None:
    if not kept:
        raise AssertionError(f"broken promise: {what}")


def _is_json(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    return value is None or type(value) in {bool, int, float, str}
