"""What every generator must keep to; each one's test calls these."""

from collections.abc import Mapping, Sequence

from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import check_crystal
from pipelines.candidate import Candidate, Generator


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


def _promise(kept: bool, what: str) -> None:
    if not kept:
        raise AssertionError(f"broken promise: {what}")


def _is_json(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    return value is None or type(value) in {bool, int, float, str}
