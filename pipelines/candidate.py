"""A proposed crystal or formula, where it came from, and the contract of whatever proposes it."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from gnome.crystals.crystal import Crystal


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where a candidate came from, kept for ever: enough to make it again.

    `parent_id` is the id of the crystal it was made from; None for one made from a formula alone.
    `parameters` are JSON values.
    """

    generator: str
    parent_id: str | None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return {
            "generator": self.generator,
            "parent_id": self.parent_id,
            "parameters": dict(self.parameters),
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A proposed crystal with its lineage."""

    crystal: Crystal
    lineage: Lineage

    @property
    def id(self) -> str:
        """Content hash over crystal and lineage."""
        described = json.dumps([self.crystal.id, self.lineage.to_dict()], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return {"crystal": self.crystal.to_dict(), "lineage": self.lineage.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuild what `to_dict` gave."""
        return cls(crystal=Crystal.from_dict(fields["crystal"]), lineage=Lineage(**fields["lineage"]))


class Generator(Protocol):
    """Proposes candidates from known crystals.

    The same parents, limits and seed give the same candidates in the same order; parents are not changed; no two candidates of a
    call are the same crystal; nothing proposed fails the geometric gate.
    """

    @property
    def name(self) -> str:
        """Short name for lineages."""
        ...

    def propose(self, parents: Sequence[Crystal], *, limit: int, seed: int) -> Iterator[Candidate]:
        """Yield at most `limit` candidates."""
        ...
