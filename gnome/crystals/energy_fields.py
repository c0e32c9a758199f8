"""What stands beside a crystal in a file: its energies, under whatever name, and with what kind of calculation they were made."""

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from gnome.errors import InvalidCrystal
from gnome.quantities import Quantity

ALIASES: Final = {"formation_energy_per_atom": Quantity.E_FORM_PER_ATOM}
"""Names of other programs that mean a quantity of ours: the Materials Project's formation energy."""

GGA: Final = "GGA/GGA+U"
"""PBE with and without U, which the corrections of the Materials Project bring onto one scale."""
_GGA_NAMES: Final = frozenset({"GGA", "GGA+U", "GGAU", "PBE", "PBE+U", "PBEU", "GGAGGA+U"})

_ENERGY: Final = re.compile(
    r"energ(y|ies)|^e_?(0|tot|total|form|formation|cell|dft|ref|pbe)?(_per_?atom)?$|^(tot|dft|ref)_?e$|^toten"
)
_NO_ENERGY: Final = re.compile(
    r"hull|fermi|kinetic|cut|decompos|react|surface|adsor|bind|band|gap|correction|adjust|uncertain|error|std|var|spread|shift|"
    r"isolated|weight|equilib|zero|elast|strain|transition|barrier|ioniz|electron|unit|type|source|key"
)
_AGREE: Final = 1e-3
"""eV/atom by which two names of one energy may differ: tables are rounded."""


def with_own_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Add what other programs' names mean to fields; raises InvalidCrystal where two names of one energy disagree."""
    named = dict(fields)
    for other, quantity in ALIASES.items():
        value = fields.get(other)
        if value is None or (isinstance(value, str) and value.strip().lower() in {"", "nan", "none", "null"}):
            continue
        given = number(value)
        if given is None:
            raise InvalidCrystal("energy", f"{other} is {str(value)[:60]!r}, expected a number")
        own = number(fields.get(quantity))
        if own is not None and abs(own - given) > _AGREE:
            raise InvalidCrystal("energy", f"{other} is {given:g} and {quantity} {own:g} eV/atom; keep one")
        named[str(quantity)] = given if own is None else own
    return named


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

    Raises InvalidCrystal for what is no number.
    """
    value = fields.get(key)
    if value is None or not str(value).strip():
        return None
    read = number(value)
    if read is None:
        raise InvalidCrystal("energy", f"{key} is {str(value)[:60]!r}, expected a number of eV")
    return read if re.search(r"per_?atom$", key.lower()) else read / n_atoms


def family_of(run_type: str) -> str:
    """Name the family of a run type, as the Materials Project spells them: energies of two families never meet.

    GGA and GGA+U (also written PBE) are one; SCAN, R2SCAN, PBEsol, HSE06 and all others are one each.
    """
    plain = re.sub(r"[\s_-]", "", run_type).upper()
    return GGA if plain in _GGA_NAMES else plain


def run_family(fields: Mapping[str, Any]) -> str:
    """Family of the run type that fields state as `run_type` or `thermo_type`; empty where they do not say.

    Raises InvalidCrystal where the two disagree.
    """
    said = {
        name: fields[name] for name in ("run_type", "thermo_type") if isinstance(fields.get(name), str) and fields[name].strip()
    }
    families = {name: family_of(value) for name, value in said.items()}
    if len(set(families.values())) > 1:
        stated = " and ".join(f"{name} is {value}" for name, value in said.items())
        raise InvalidCrystal("run_type", f"{stated[:200]}; energies of both never meet")
    return next(iter(families.values()), "")
