"""Crystals from JSON records that came from somewhere: plain dictionaries, read field by field and never by pymatgen's own decoder."""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.energy_fields import AGREE, ALIASES, check_stated_energy, number, one_family
from gnome.errors import InvalidCrystal
from gnome.quantities import Quantity

NUMERIC_FIELDS: Final = frozenset(str(quantity) for quantity in Quantity if quantity.unit.startswith("eV"))
"""Columns whose text is read as a number; every other stays text, so that sodium nitride is `NaN` and not missing."""


def check_count(n_atoms: int, max_atoms: int) -> None:
    """Refuse what announces no atom or too many, before anything is built."""
    if n_atoms < 1:
        raise InvalidCrystal("empty", "it announces no atoms, expected 1 or more")
    if n_atoms > max_atoms:
        raise InvalidCrystal("too_many_atoms", f"it announces {n_atoms} atoms, expected 1 to {max_atoms}")


_WHOLE = 1e-6
"""How far an occupancy may be from 1."""


def read_entry(record: Any, *, max_atoms: int) -> tuple[Crystal, dict[str, Any]]:
    """Read a ComputedStructureEntry, a pymatgen Structure or a record of `Crystal.to_dict`, as plain dictionaries."""
    if not isinstance(record, dict):
        raise InvalidCrystal("malformed", f"expected a JSON object with a structure, got {type(record).__name__}")
    structure = record.get("structure", record)
    if isinstance(structure, dict) and "atomic_numbers" in structure:
        _check_periodic(structure.get("pbc"))
        crystal = Crystal.from_dict(structure)
    else:
        crystal = _structure_record(structure, max_atoms)
    beside, parameters = record.get("data"), record.get("parameters")
    fields = _fields(record, beside)
    fields |= _energies(record, fields, crystal.n_atoms)
    if record.get("composition") is not None:
        _check_composition(record["composition"], crystal)
    places = {"run_type": record, "data.run_type": beside, "parameters.run_type": parameters}.items()
    stated = ((name, _plain(place).get("run_type")) for name, place in places)
    said = [(name, value) for name, value in stated if isinstance(value, str) and value.strip()]
    one_family(said)
    if said:
        fields["run_type"] = said[-1][1]
    return crystal, fields


def _plain(record: Any, skipped: frozenset[str] | set[str] = frozenset()) -> dict[str, Any]:
    """Take texts and numbers out of a record that may be anything."""
    if not isinstance(record, dict):
        return {}
    return {str(name): value for name, value in record.items() if isinstance(value, str | int | float) and name not in skipped}


def _fields(record: dict[str, Any], beside: Any) -> dict[str, Any]:
    """Join what a record and its `data` say; raises InvalidCrystal where the two give a quantity other values."""
    own = _plain(record, skipped={"energy"}) | {name: record[name] for name in NUMERIC_FIELDS & record.keys()}
    others = _plain(beside)
    for name in (NUMERIC_FIELDS | ALIASES.keys()) & own.keys() & others.keys():
        one, other = number(own[name]), number(others[name])
        if one is not None and other is not None and abs(one - other) > AGREE:
            raise InvalidCrystal("energy", f"{name} is {one:g} and, in data, {other:g} eV/atom; keep one")
    return own | others


def _energies(record: dict[str, Any], stated: dict[str, Any], n_atoms: int) -> dict[str, float]:
    """Energy and correction, eV/atom, of those that an entry gives of its cell; what is `stated` beside them may not say otherwise."""
    cell: dict[str, float] = {}
    for name, quantity in (("energy", Quantity.ENERGY_PER_ATOM), ("correction", Quantity.CORRECTION_PER_ATOM)):
        if record.get(name) is None:
            continue
        if not isinstance(record[name], int | float) or isinstance(record[name], bool):
            raise InvalidCrystal("energy", f"{name} is {str(record[name])[:60]!r}, expected a number")
        cell[str(quantity)] = record[name] / n_atoms
    if record.get("energy_adjustments"):
        adjusted = _adjustments(record["energy_adjustments"]) / n_atoms
        own = cell.get(Quantity.CORRECTION_PER_ATOM)
        if own and abs(own - adjusted) > AGREE:  # pymatgen may write 0 beside adjustments, and means these
            raise InvalidCrystal(
                "energy", f"correction is {record['correction']:g} eV, energy_adjustments sum to {adjusted * n_atoms:g}; keep one"
            )
        cell[str(Quantity.CORRECTION_PER_ATOM)] = adjusted
    if (in_cell := cell.get(Quantity.CORRECTION_PER_ATOM)) is not None:
        per_atom = number(stated.get(Quantity.CORRECTION_PER_ATOM))
        if per_atom is not None and abs(per_atom - in_cell) > AGREE:
            raise InvalidCrystal(
                "energy", f"correction is {in_cell:g} eV/atom, {Quantity.CORRECTION_PER_ATOM} {per_atom:g}; keep one"
            )
    if (energy := cell.get(Quantity.ENERGY_PER_ATOM)) is not None:
        correction = number((stated | cell).get(Quantity.CORRECTION_PER_ATOM))
        check_stated_energy(energy, number(stated.get(Quantity.ENERGY_PER_ATOM)), correction)
        other = number(stated.get("energy"))  # of data; the record's own was left out
        if other is not None and abs(other / n_atoms - energy) > AGREE:
            raise InvalidCrystal("energy", f"energy is {record['energy']:g} and, in data, {other:g} eV; keep one")
    return cell


def _adjustments(listed: Any) -> float:
    """Sum pymatgen's energy adjustments of a cell, eV."""
    total = 0.0
    for one in listed if isinstance(listed, list) else [listed]:
        plain = _plain(one)
        try:
            if "value" in plain:
                total += float(plain["value"])
            else:
                per_atom = (
                    float(plain["adj_per_atom"])
                    if "adj_per_atom" in plain
                    else float(plain["adj_per_deg"]) * float(plain["temp"])
                )
                total += per_atom * float(plain["n_atoms"])
        except (KeyError, ValueError):
            raise InvalidCrystal(
                "energy", f"energy_adjustments holds {str(one)[:60]!r}, whose energy is not understood; give the correction alone"
            ) from None
    return total


def _check_composition(composition: Any, crystal: Crystal) -> None:
    """Refuse an entry whose energy is of other atoms than its structure has."""
    found = {symbol: crystal.symbols.count(symbol) for symbol in dict.fromkeys(crystal.symbols)}
    try:
        stated: dict[str, float] = {}
        for name, amount in composition.items():
            symbol = name.rstrip("0123456789.+-") if isinstance(name, str) else str(name)  # pymatgen may add a charge
            stated[symbol] = stated.get(symbol, 0.0) + float(amount)
    except (AttributeError, TypeError, ValueError):
        raise InvalidCrystal("malformed", f"composition is {str(composition)[:60]!r}, expected amounts by symbol") from None
    if stated != found:
        raise InvalidCrystal("formula_mismatch", f"the composition is {stated}, the structure has {found}")


def _check_periodic(pbc: Any) -> None:
    """Refuse slabs, wires and molecules; what does not say how it repeats is a crystal."""
    if pbc is not None and pbc is not True and (not isinstance(pbc, list) or not all(pbc)):
        raise InvalidCrystal("not_periodic", f"periodic in {str(pbc)[:60]}; a crystal is periodic in all three directions")


def _structure_record(record: Any, max_atoms: int) -> Crystal:
    try:
        matrix, sites = np.asarray(record["lattice"]["matrix"], dtype=np.float64), record["sites"]
        _check_periodic(record["lattice"].get("pbc"))
        _check_cell(record["lattice"], matrix)
        check_count(len(sites), max_atoms)
        symbols, coords = [], []
        for site in sites:
            species = site["species"]
            occupancy = float(species[0].get("occu", 1)) if species else 0.0
            if len(species) != 1 or not abs(occupancy - 1) < _WHOLE:
                raise InvalidCrystal(
                    "disordered", f"a site is occupied to {occupancy:g} by one species, expected 1; give an ordered crystal"
                )
            symbol = str(species[0]["element"])
            if symbol in {"D", "T"}:
                raise InvalidCrystal("isotope", f"{symbol} is an isotope; write it as H")
            symbols.append(symbol)
            coords.append([float(value) for value in site["abc"]])
        places = np.asarray(coords).reshape(-1, 3)
        _check_places(sites, places, matrix)
        return Crystal.from_symbols(matrix, symbols, places)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InvalidCrystal("malformed", f"not a structure of pymatgen ({type(error).__name__}: {error})") from None


_CELL = 0.015
"""Share by which lengths of a cell may differ from those of its vectors, which count; a volume may by three times that."""
_ANGLE = 1.0
"""Degrees by which angles may."""
_PLACE = 0.05
"""Angstrom by which the two places of a site may."""


def _check_cell(lattice: dict[str, Any], matrix: NDArray[np.float64]) -> None:
    """Refuse a lattice whose lengths, angles or volume are not those of its vectors: one of the two was edited."""
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        return  # refused for that further on
    lengths = np.linalg.norm(matrix, axis=1)
    if not lengths.all():
        return
    found = dict(zip("abc", lengths.tolist(), strict=True))
    for name, (i, j) in {"alpha": (1, 2), "beta": (0, 2), "gamma": (0, 1)}.items():
        cosine = float(matrix[i] @ matrix[j] / (lengths[i] * lengths[j]))
        found[name] = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
    found["volume"] = abs(float(np.linalg.det(matrix)))
    for name, value in found.items():
        stated = lattice.get(name)
        if stated is None:
            continue
        allowed = _CELL * value if name in "abc" else 3 * _CELL * value if name == "volume" else _ANGLE
        if not abs(float(stated) - value) <= allowed:
            raise InvalidCrystal(
                "malformed", f"the lattice says {name} is {float(stated):g}, its matrix {value:g}; keep one of the two"
            )


def _check_places(sites: list[dict[str, Any]], coords: NDArray[np.float64], matrix: NDArray[np.float64]) -> None:
    """Refuse sites whose xyz are not where their abc are; either may be in another cell."""
    stated = [site.get("xyz") for site in sites]
    if None in stated or matrix.shape != (3, 3) or not np.isfinite(matrix).all() or not abs(np.linalg.det(matrix)) > _FLAT:
        return
    away = np.array(stated, dtype=np.float64) - coords @ matrix
    if not np.isfinite(away).all():
        return
    away -= np.round(away @ np.linalg.inv(matrix)) @ matrix
    distances = np.linalg.norm(away, axis=1)
    if (distances > _PLACE).any():
        i = int(distances.argmax())
        raise InvalidCrystal(
            "malformed",
            f"site {i} stands at abc {coords[i].tolist()} and at xyz {stated[i]}, which are not one place; keep one of the two",
        )


_FLAT = 1e-6
"""Angstrom^3 below which a cell has no inverse to speak of; the gate refuses it."""
