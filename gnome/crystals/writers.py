"""Writers of crystals: CIF, POSCAR, extxyz, JSON entries, CSV with a `cif` column, Parquet; what they write, `formats` reads back."""

import csv
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import ase.io
import ase.io.extxyz
from ase.calculators.singlepoint import SinglePointCalculator
from pymatgen.io.vasp import Poscar

from gnome.atomic_write import atomic_write, require_writable
from gnome.crystals.cif_energies import CIF_PREFIX
from gnome.crystals.cif_text import cif_text
from gnome.crystals.convert import to_atoms, to_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal
from gnome.crystals.shards import write_shard
from gnome.errors import InvalidInput
from gnome.quantities import Quantity

_IN_CIF: Final = (
    Quantity.METHOD, Quantity.ENERGY_PER_ATOM, Quantity.CORRECTION_PER_ATOM, Quantity.E_FORM_PER_ATOM, Quantity.E_ABOVE_HULL,
)  # fmt: skip


def to_cif(item: ReadCrystal) -> str:
    """CIF text with the crystal's symmetry; its data block is named by formula and label, and holds energies as `_gnome_...` items."""
    said = {f"{CIF_PREFIX}{name}": item.fields[name] for name in _IN_CIF if isinstance(item.fields.get(name), str | int | float)}
    return cif_text(item.crystal, _block_name(item), said)


def to_cifs(items: Iterable[ReadCrystal]) -> str:
    """Several crystals in one CIF, a data block each; what is called alike, as a crystal of two methods, is numbered."""
    names: Counter[str] = Counter()
    blocks = []
    for item in items:
        name = _block_name(item)
        names[name.lower()] += 1
        n = names[name.lower()]
        while n > 1 and names[f"{name}_{n}".lower()]:
            n += 1
        own = name if n == 1 else f"{name}_{n}"
        names[own.lower()] += n > 1
        blocks.append(to_cif(item).replace(f"data_{name}\n", f"data_{own}\n", 1))
    return "".join(blocks)


def _block_name(item: ReadCrystal) -> str:
    name = re.sub(r"[^A-Za-z0-9_]+", "_", item.label)[-60:] or "crystal"
    return f"{item.crystal.reduced_formula}_{name}"


def to_poscar(item: ReadCrystal) -> str:
    """POSCAR text, atoms grouped by element as the format wants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen's remark on Structure.from_file
        return str(
            Poscar(to_structure(item.crystal).get_sorted_structure(), comment=_one_line(item.label)).get_str(
                significant_figures=10
            )
        )


def to_extxyz(items: Iterable[ReadCrystal]) -> str:
    """Extended XYZ, a frame a crystal; the energy per cell where `energy_per_atom` is known, other fields in the comment line."""
    text = io.StringIO()
    for item in items:
        atoms = to_atoms(item.crystal)
        fields = {name: value for name, value in item.fields.items() if isinstance(value, str | int | float)}
        energy = fields.pop(Quantity.ENERGY_PER_ATOM, None)
        if isinstance(energy, int | float):
            atoms.calc = SinglePointCalculator(atoms, energy=energy * item.crystal.n_atoms)
        atoms.info = {
            name: _as_text(value) if isinstance(value, str) else value for name, value in {"label": item.label, **fields}.items()
        }
        ase.io.write(text, atoms, format="extxyz")
    return text.getvalue()


def _as_text(text: str) -> str:
    """Mark a text that ASE would read as a number, as it would the formulas NaN and InF and an id of digits; what is plain stays so."""
    if '"' in text or "\\" in text:
        return text  # no number, and ASE's marks hold no such characters
    read = ase.io.extxyz.key_val_str_to_dict(f'x="{text}"').get("x")
    return text if isinstance(read, str) and read == text else f"_JSON {json.dumps(text)}"


def to_json(items: Iterable[ReadCrystal]) -> str:
    """A JSON list: a ComputedStructureEntry where the energy is known, else an object with `entry_id`, `structure` and `data`."""
    return json.dumps([_entry(item) for item in items], allow_nan=False)


def to_csv(items: Iterable[ReadCrystal]) -> str:
    """CSV with the columns `id`, `reduced_formula`, every field that occurs, and `cif`."""
    items = list(items)
    names = list(
        dict.fromkeys(str(name) for item in items for name in item.fields if name not in {"id", "cif", Quantity.REDUCED_FORMULA})
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", str(Quantity.REDUCED_FORMULA), *names, "cif"], lineterminator="\n")
    writer.writeheader()
    for item in items:
        fields = {str(name): value for name, value in item.fields.items() if str(name) in names}
        writer.writerow(
            {
                "id": item.label,
                str(Quantity.REDUCED_FORMULA): item.crystal.reduced_formula,
                **fields,
                "cif": to_cif(replace(item, fields={})),
            }
        )
    return text.getvalue()


_MANY: Final[Mapping[str, Callable[[Iterable[ReadCrystal]], str]]] = {".extxyz": to_extxyz, ".json": to_json, ".csv": to_csv}
_ONE: Final[Mapping[str, Callable[[ReadCrystal], str]]] = {".cif": to_cif, ".vasp": to_poscar}


def check_target(path: Path) -> None:
    """Raise InvalidInput unless `write_crystals` could write there: a known ending or a folder, below a folder that can be written."""
    known = {*_MANY, *_ONE, ".parquet"}
    if not path.name or (path.suffix and path.suffix.lower() not in known):
        raise InvalidInput(
            f"{path}: no format is called {path.suffix or 'nothing'!r}; there are {', '.join(sorted(known))}, or a folder"
        )
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InvalidInput(f"{path}: is neither a file nor a folder")
    require_writable(path)


def write_crystals(path: Path, items: Iterable[ReadCrystal], *, kind: str | None = None) -> int:
    """Write crystals in the format that the path's ending names, or `kind`, an ending without its dot; returns how many.

    A CIF file holds a data block a crystal.  A POSCAR (`.vasp`) holds one crystal: several go into a folder of that name, a file each, and
    so do CIFs where the path is a folder or has no ending.  Files appear whole or not at all.
    Raises InvalidInput for an ending that names no format, and OSError naming the file that cannot be written.
    """
    suffix = f".{kind}" if kind else path.suffix.lower()
    items = list(items)
    if suffix == ".parquet":
        names = list(dict.fromkeys(str(name) for item in items for name in item.fields))
        columns = {name: [item.fields.get(name) for item in items] for name in names}
        write_shard(path, [item.crystal for item in items], columns)
    elif suffix in _MANY:
        _write(path, _MANY[suffix](items))
    elif suffix in _ONE and len(items) == 1 and path.suffix:
        _write(path, _ONE[suffix](items[0]))
    elif suffix == ".cif" and path.suffix and not path.is_dir():  # a file may hold several data blocks
        _write(path, to_cifs(items))
    elif suffix in _ONE:
        for number, item in enumerate(items, start=1):
            name = f"{number:06d}_{item.crystal.reduced_formula}_{_file_name(item.label)}"
            _write(path / f"{name}{suffix}", _ONE[suffix](item))
    else:
        raise InvalidInput(
            f"{path}: no format is called {suffix or 'nothing'!r}; there are {', '.join([*_MANY, *_ONE, '.parquet'])}"
        )
    return len(items)


def _entry(item: ReadCrystal) -> dict[str, Any]:
    crystal: Crystal = item.crystal
    fields = dict(item.fields)
    energy, correction = fields.pop(Quantity.ENERGY_PER_ATOM, None), fields.pop(Quantity.CORRECTION_PER_ATOM, None)
    entry = {
        "entry_id": item.label,
        "structure": to_structure(crystal).as_dict(),
        "data": {str(name): value for name, value in fields.items()},
    }
    if energy is None:
        return entry
    kind = {"@module": "pymatgen.entries.computed_entries", "@class": "ComputedStructureEntry"}
    composition = {symbol: crystal.symbols.count(symbol) for symbol in dict.fromkeys(crystal.symbols)}
    cell = {"energy": energy * crystal.n_atoms, "correction": (correction or 0.0) * crystal.n_atoms}
    return {**kind, **cell, "composition": composition, "parameters": {}, **entry}


def _one_line(text: str) -> str:
    return " ".join(text.split())[:80] or "crystal"


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", label)[-60:].lstrip(".") or "crystal"


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
