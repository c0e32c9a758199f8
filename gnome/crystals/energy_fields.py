"""What stands beside a crystal in a file: its energies, under whatever name, and with what kind of calculation they were made."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from gnome.errors import InvalidCrystal
from gnome.quantities import Quantity

ALIASES: Final = {"formation_energy_per_atom": Quantity.E_FORM_PER_ATOM}
"""Names of other programs that mean a quantity of ours: the Materials Project's formation energy."""

GGA: Final = "GGA/GGA+U"
"""PBE with and without U, which the corrections of the Materials Project bring onto one scale."""
_WITH_U: Final = frozenset({"GGA+U", "GGAU", "PBE+U", "PBEU"})
_GGA_NAMES: Final = frozenset({"GGA", "PBE", "GGAGGA+U", "GGA/GGA+U"}) | _WITH_U

_ENERGY: Final = re.compile(
    r"energ(y|ies)|^e_?(0|tot|total|form|formation|cell|dft|ref|pbe)?(_per_?atom)?$|^(tot|dft|ref)_?e$|^toten"
)
_NO_ENERGY: Final = re.compile(
    r"hull|fermi|kinetic|cut|decompos|react|surface|adsor|bind|band|gap|correction|adjust|uncertain|error|std|var|spread|shift|"
    r"isolated|weight|equilib|zero|elast|strain|transition|barrier|ioniz|electron|unit|type|source|key"
)
AGREE: Final = 1e-3
"""eV/atom by which two statements of one energy may differ: tables are rounded."""
_UNCORRECTED: Final = ("uncorrected_energy_per_atom", "uncorrected_energy")
"""The Materials Project's names of the raw energy, beside which its `energy_per_atom` holds the corrections."""
_RAW: Final = frozenset({"energy", str(Quantity.ENERGY_PER_ATOM), *_UNCORRECTED})
"""Names of energies that corrections are to be added to."""


def with_own_names(fields: Mapping[str, Any], n_atoms: int) -> dict[str, Any]:
    """Add what other programs' names mean to the fields of a crystal; raises InvalidCrystal where two names of one energy disagree."""
    named = dict(fields)
    for other, quantity in ALIASES.items():
        given = _stated(fields, other)
        if given is None:
            continue
        own = number(fields.get(quantity))
        if own is not None and abs(own - given) > AGREE:
            raise InvalidCrystal("energy", f"{other} is {given:g} and {quantity} {own:g} eV/atom; keep one")
        named[str(quantity)] = given if own is None else own
    return named | _raw(named, n_atoms)


def _stated(fields: Mapping[str, Any], name: str) -> float | None:
    """The number of a field, None where it says nothing; raises InvalidCrystal for what is no number."""
    value = fields.get(name)
    if value is None or (isinstance(value, str) and value.strip().lower() in {"", "nan", "none", "null"}):
        return None
    if (given := number(value)) is None:
        raise InvalidCrystal("energy", f"{name} is {str(value)[:60]!r}, expected a number")
    return given


def _raw(fields: Mapping[str, Any], n_atoms: int) -> dict[str, float]:
    """Energy without corrections and the correction, eV/atom, where the raw energy stands beside a corrected one."""
    energy = number(fields.get(Quantity.ENERGY_PER_ATOM))
    correction = number(fields.get(Quantity.CORRECTION_PER_ATOM)) or 0.0
    if energy is None:
        return {}
    for name in _UNCORRECTED:
        stated = _stated(fields, name)
        if stated is None:
            continue
        raw = stated if name.endswith("per_atom") else stated / n_atoms
        if abs(energy - raw) <= AGREE:
            continue
        if correction and abs(energy - raw - correction) > AGREE:
            raise InvalidCrystal(
                "energy",
                f"{name} is {raw:g} eV/atom, the energy {energy:g}, the correction {correction:g}, which do not add up; correct one",
            )
        return {str(Quantity.ENERGY_PER_ATOM): raw, str(Quantity.CORRECTION_PER_ATOM): energy - raw}
    return {}


def check_stated_energy(energy: float, stated: float | None, correction: float | None) -> None:
    """Refuse an energy per atom that is stated beside that of the cell, `energy` eV/atom, and is neither that nor the corrected one."""
    if stated is not None and min(abs(stated - energy), abs(stated - energy - (correction or 0.0))) > AGREE:
        raise InvalidCrystal("energy", f"energy is {energy:g} eV/atom, {Quantity.ENERGY_PER_ATOM} {stated:g}; keep one")


def number(value: Any) -> float | None:
    """Read a finite number, text of one too; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        read = float(value)
    except (ValueError, OverflowError):
        return None
    return read if math.isfinite(read) else None


def unread_energies(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of fields that look like an energy of the crystal and are no quantity of ours, so that nothing reads them."""
    own = {str(quantity) for quantity in Quantity} | ALIASES.keys()
    if fields.get(Quantity.ENERGY_PER_ATOM) is not None:
        own |= set(_UNCORRECTED)  # from which the correction was taken
    return tuple(
        name
        for name, value in fields.items()
        if name not in own
        and value is not None
        and str(value).strip()
        and _ENERGY.search(name.lower())
        and not _NO_ENERGY.search(name.lower())
    )


def is_formation(name: str) -> bool:
    """Say whether a field that looks like an energy looks like one of formation."""
    return bool(re.search(r"form", name.lower()))


def energy_per_atom_under(fields: Mapping[str, Any], key: str, n_atoms: int) -> float | None:
    """Energy, eV/atom, of a field that holds eV per cell, or per atom where its name ends so; None where there is none.

    `energy` is what is read unless a name is given, in formats that have it.  Raises InvalidCrystal for what is no number, and where a
    correction stands beside an energy that may hold it already.
    """
    value = fields.get(key)
    if key == "energy" and value is None:
        value, key = fields.get(Quantity.ENERGY_PER_ATOM), str(Quantity.ENERGY_PER_ATOM)
    if value is None or not str(value).strip():
        return None
    read = number(value)
    if read is None:
        raise InvalidCrystal("energy", f"{key} is {str(value)[:60]!r}, expected a number of eV")
    energy = read if re.search(r"per_?atom$", key.lower()) else read / n_atoms
    correction = number(fields.get(Quantity.CORRECTION_PER_ATOM))
    if correction and key not in _RAW:
        beside = f"a correction of {correction:g} eV/atom stands beside it"
        raise InvalidCrystal("energy", f"{key}: {beside}, and whether it is in there is not known; leave one of the two out")
    if key == "energy":
        check_stated_energy(energy, number(fields.get(Quantity.ENERGY_PER_ATOM)), correction)
    return energy


def family_of(run_type: str) -> str:
    """Name the family of a run type, as the Materials Project spells them: energies of two families never meet.

    GGA and GGA+U (also written PBE) are one; SCAN, R2SCAN, PBEsol, HSE06 and all others are one each.
    """
    plain = _plain(run_type)
    return GGA if plain in _GGA_NAMES else plain


def _plain(run_type: str) -> str:
    return re.sub(r"[\s_-]", "", run_type).upper()


def run_family(fields: Mapping[str, Any]) -> str:
    """Family of the run type that fields state as `run_type` or `thermo_type`; empty where they do not say.

    Raises InvalidCrystal where the two disagree.
    """
    return one_family((name, fields.get(name)) for name in ("run_type", "thermo_type"))


def one_family(stated: Iterable[tuple[str, Any]]) -> str:
    """Family of run types, stated under names; empty where none is.  Raises InvalidCrystal where two of them disagree."""
    said = [(name, value) for name, value in stated if isinstance(value, str) and value.strip()]
    if len(families := {family_of(value): None for _, value in said}) > 1:
        shown = " and ".join(f"{name} is {value}" for name, value in said)
        raise InvalidCrystal("run_type", f"{shown[:200]}; energies of both never meet")
    return next(iter(families), "")


def has_u(fields: Mapping[str, Any]) -> bool:
    """Say whether fields state PBE with U, whose energies meet those without once they are corrected."""
    return any(_plain(str(fields.get(name) or "")) in _WITH_U for name in ("run_type", "thermo_type"))
