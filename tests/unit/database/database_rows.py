"""Small records to fill test databases with."""

from typing import Any

import numpy as np

from gnome.crystals.crystal import Crystal
from gnome.database.records import CandidateRecord, CrystalRecord, EvaluationRecord, ModelRecord
from gnome.stability.method import Method

CHGNET = Method(code="chgnet", functional="0.3.0", versions={"chgnet": "0.4.2"})
EMT = Method(code="ase", functional="emt", correction_scheme="mp2020", correction_version="1")


def crystal(edge: float, symbols: list[str]) -> Crystal:
    coords = [[i / len(symbols)] * 3 for i in range(len(symbols))]
    return Crystal.from_symbols(np.eye(3) * edge, symbols, coords)


def seed(edge: float = 4.0, symbols: tuple[str, ...] = ("Na", "Cl"), **fields: Any) -> CrystalRecord:
    given = {"method": CHGNET, "e_form_per_atom": -2.0, "fingerprint": f"{symbols}-{edge}", "origin": "seed", **fields}
    return CrystalRecord(crystal=crystal(edge, list(symbols)), **given)


def candidate(name: str, number: int = 1, symbols: tuple[str, ...] = ("K", "Cl"), **fields: Any) -> CandidateRecord:
    edge = 5.0 + len(name) / 100
    return CandidateRecord(id=name, round=number, generator="substitution", crystal=crystal(edge, list(symbols)), **fields)


def answer(name: str, number: int = 1, **fields: Any) -> EvaluationRecord:
    given = {"method": CHGNET, "converged": True, "energy_per_atom": -3.5, "e_form_per_atom": -1.5, **fields}
    return EvaluationRecord(candidate_id=name, round=number, **given)


def model(name: str, **fields: Any) -> ModelRecord:
    return ModelRecord(**{"id": name, "kind": "structural", "path": f"{name}.safetensors", "sha256": "0" * 64, **fields})
