"""Crystals from JSON records that came from somewhere: plain dictionaries, read field by field and never by pymatgen's own decoder."""

from typing import Any, Final

import numpy as np

from gnome.crystals.crystal import Crystal
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
    fields = {name: record[name] for name in NUMERIC_FIELDS & record.keys()}
    beside = record.get("data")
    fields |= {
        str(name): value
        for name, value in (beside.items() if isinstance(beside, dict) else ())
        if isinstance(value, str | int | float)
    }
    for name, quantity in (("energy", Quantity.ENERGY_PER_ATOM), ("correction", Quantity.CORRECTION_PER_ATOM)):
        if record.get(name) is None:
            continue
        if not isinstance(record[name], int | float) or isinstance(record[name], bool):
            raise InvalidCrystal("energy", f"{name} is {str(record[name])[:60]!r}, expected a number")
        fields[str(quantity)] = record[name] / crystal.n_atoms
    if record.get("composition") is not None:
        _check_composition(record["composition"], crystal)
    parameters = record.get("parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("run_type"), str):
        fields["run_type"] = parameters["run_type"]
    return crystal, fields


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
        matrix, sites = record["lattice"]["matrix"], record["sites"]
        _check_periodic(record["lattice"].get("pbc"))
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
        return Crystal.from_symbols(np.asarray(matrix, dtype=np.float64), symbols, np.asarray(coords).reshape(-1, 3))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InvalidCrystal("malformed", f"not a structure of pymatgen ({type(error).__name__}: {error})") from None
