import json
import math

import pytest

from gnome.errors import EvaluatorUnavailable, InvalidInput
from gnome.stability.references import ElementalReferences

REFERENCES = ElementalReferences(method="chgnet", energies={8: -4.9, 3: -1.9})


def test_formation_energy_is_per_atom_and_corrected() -> None:
    # Li2O: (-3 * 4.0 + 2 * 1.9 + 4.9) / 3, and the correction as it is
    assert REFERENCES.formation_energy_per_atom({3: 4, 8: 2}, -4.0) == pytest.approx((-12.0 + 3.8 + 4.9) / 3)
    assert REFERENCES.formation_energy_per_atom({3: 2, 8: 1}, -4.0, -0.2) == pytest.approx((-12.0 + 3.8 + 4.9) / 3 - 0.2)
    assert REFERENCES.formation_energy_per_atom({3: 7}, -1.9) == 0.0


def test_missing_references_are_named() -> None:
    with pytest.raises(EvaluatorUnavailable, match="no elemental reference for Na, Cl under chgnet"):
        REFERENCES.formation_energy_per_atom({3: 1, 11: 1, 17: 1}, -1.0)


def test_json_round_trip() -> None:
    written = json.dumps(REFERENCES.to_dict())
    assert json.loads(written) == {"method": "chgnet", "energies": {"Li": -1.9, "O": -4.9}}
    assert ElementalReferences.from_dict(json.loads(written)) == REFERENCES
    assert REFERENCES.elements == {3, 8}


@pytest.mark.parametrize(
    "fields", [{}, {"method": "m"}, {"method": "m", "energies": {"Qq": 1.0}}, {"method": "m", "energies": {"Li": "x"}}, []]
)
def test_other_json_is_refused(fields: object) -> None:
    with pytest.raises(InvalidInput, match="not a record of elemental references"):
        ElementalReferences.from_dict(fields)  # type: ignore[arg-type]


def test_references_are_frozen_finite_numbers_of_elements() -> None:
    with pytest.raises(TypeError):
        REFERENCES.energies[3] = 0.0  # type: ignore[index]
    with pytest.raises(InvalidInput, match="reference energy of Li is nan"):
        ElementalReferences(method="m", energies={3: math.nan})
    with pytest.raises(InvalidInput, match="atomic number 0"):
        ElementalReferences(method="m", energies={0: 1.0})
