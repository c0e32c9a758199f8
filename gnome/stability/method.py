"""What stands behind an energy."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """Code, functional, settings and versions that produce energies which may meet on one hull.

    `settings` holds what changes an energy (and nothing else); `versions` are recorded but do not split the hull.
    `correction_scheme` and its version name what is added to raw energies; empty when nothing is.
    """

    code: str
    functional: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    correction_scheme: str = ""
    correction_version: str = ""

    @property
    def label(self) -> str:
        """Short stable name, for example `chgnet-0.3.0-1f2e3d4c`; equal labels mean one hull."""
        defining = [self.code, self.functional, dict(self.settings), self.correction_scheme, self.correction_version]
        digest = hashlib.sha256(json.dumps(defining, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.code}-{self.functional}-{digest}".lower().replace(" ", "_")

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return {
            "code": self.code,
            "functional": self.functional,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "correction_scheme": self.correction_scheme,
            "correction_version": self.correction_version,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Method":
        """Rebuild what `to_dict` gave."""
        return cls(**fields)
