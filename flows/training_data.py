"""What an ensemble learns from: crystals with their formation energies, out of any file that this program reads.

A formation energy is taken as a file gives it; from total energies it is taken by the lowest entry of each element among all sources.
Nothing is left out in silence: what cannot be used is an error that names the first of its kind, for an ensemble learns what it is given.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.energy_fields import energy_per_atom_under, number, run_family, unread_energies
from gnome.crystals.formats import ReadCrystal, Refusal, read_crystals
from gnome.errors import InvalidCrystal, InvalidInput
from gnome.models.compositional import TARGETS
from gnome.models.datasets import read_labelled_crystals
from gnome.models.formula_labels import LabelledFormulas, checked_row, lowest_labels, read_labelled_formulas
from gnome.quantities import PLAUSIBLE_E_FORM, STABLE_TOLERANCE, Quantity

_TABLES: Final = (".csv", ".tsv")


@dataclass(frozen=True)
class _Example:
    """A crystal that was read, and its formation energy, or the total one (corrections included) that it follows from; eV/atom."""

    label: str
    crystal: Crystal
    e_form: float | None
    total: float | None
    family: str


def labelled_crystals(paths: Sequence[Path], *, energy_key: str = "") -> tuple[list[Crystal], NDArray[np.float64]]:
    """Read crystals and their formation energies (n,), eV/atom, from files and folders.

    `energy_key` names the field of total energies, eV a cell (or an atom, where its name ends so), where that is no usual one.
    Raises InvalidInput naming file and entry where a crystal or its energy cannot be used, or energies of several kinds meet.
    """
    shards = [path for path in paths if _is_shard(path) and not energy_key]
    crystals, targets = read_labelled_crystals(shards)
    others = [path for path in paths if path not in shards]
    if not others:
        return crystals, targets
    examples = [_example(item, energy_key) for item in _all_usable(others)]
    if len(families := {example.family for example in examples} - {""}) > 1:
        raise InvalidInput(
            f"{', '.join(map(str, others))[:200]}: hold energies of run types that never meet, {' and '.join(sorted(families))}; "
            "train on one of them"
        )
    labels = _formation_energies(examples)
    return _without_twins(crystals, targets, examples, labels)


def _is_shard(path: Path) -> bool:
    """Whether a file is a table of crystals with formation energies, which is read at once; what is wrong with it is said then."""
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return False
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return True
    return "lattice" in names and (str(Quantity.ENERGY_PER_ATOM) not in names or str(Quantity.E_FORM_PER_ATOM) in names)


def _all_usable(paths: Sequence[Path]) -> Iterator[ReadCrystal]:
    """Yield every crystal; raises InvalidInput at the end of a source that holds one that cannot be used."""
    for path in paths:
        refused: list[Refusal] = []
        n = 0
        for item in read_crystals(path):
            n += 1
            if isinstance(item, Refusal):
                refused.append(item)
            elif not refused:
                yield item
        if refused:
            more = f"; {len(refused)} of {n} entries of {path} cannot be used" if len(refused) > 1 else ""
            raise InvalidInput(f"{refused[0].label}: {refused[0].message}{more}; mend or leave out what is named")


def _example(item: ReadCrystal, energy_key: str) -> _Example:
    try:
        family = run_family(item.fields)
        stated = number(item.fields.get(Quantity.E_FORM_PER_ATOM)) if not energy_key else None
        if energy_key:
            total = energy_per_atom_under(item.fields, energy_key, item.crystal.n_atoms)
        else:
            total = number(item.fields.get(Quantity.ENERGY_PER_ATOM))
    except InvalidCrystal as error:
        raise InvalidInput(f"{item.label}: {error}") from None
    if stated is None and total is None:
        unread = unread_energies(item.fields)
        beside = f"; it has {', '.join(unread)}: --energy-key reads one of them as total energies" if unread else ""
        wanted = energy_key or f"{Quantity.E_FORM_PER_ATOM} or {Quantity.ENERGY_PER_ATOM}"
        raise InvalidInput(f"{item.label}: no {wanted}{beside}; an ensemble learns from energies")
    correction = number(item.fields.get(Quantity.CORRECTION_PER_ATOM)) or 0.0
    return _Example(item.label, item.crystal, stated, None if total is None else total + correction, family)


def _formation_energies(examples: Sequence[_Example]) -> list[float]:
    lowest: dict[int, float] = {}
    for example in examples:
        if example.total is not None and len(example.crystal.composition) == 1:
            (z,) = example.crystal.composition
            lowest[z] = min(example.total, lowest.get(z, np.inf))
    n_given = sum(example.e_form is not None for example in examples)
    lacking = {z for example in examples if example.e_form is None for z in example.crystal.composition} - lowest.keys()
    if lacking:
        given = f"; {n_given} of {len(examples)} crystals give theirs" if n_given else ""
        raise InvalidInput(
            f"no entry of {', '.join(SYMBOLS[z] for z in sorted(lacking))} among the sources, of whose elements formation energies are "
            f"taken{given}; add the elements' entries of the same method, or a column {Quantity.E_FORM_PER_ATOM}"
        )
    found = [_formation_energy(example, lowest) for example in examples]
    for example, energy in zip(examples, found, strict=True):
        if not PLAUSIBLE_E_FORM[0] <= energy <= PLAUSIBLE_E_FORM[1]:
            expected = f"expected {PLAUSIBLE_E_FORM[0]:g} to {PLAUSIBLE_E_FORM[1]:g}"
            raise InvalidInput(
                f"{example.label}: its formation energy is {energy:g} eV/atom, {expected}; is that energy of another kind?"
            )
        if len(example.crystal.composition) == 1 and energy < -STABLE_TOLERANCE:
            raise InvalidInput(
                f"{example.label}: {example.crystal.reduced_formula} has a formation energy of {energy:g} eV/atom, an element has 0 "
                "in its lowest form; are these total energies?"
            )
    return found


def _formation_energy(example: _Example, lowest: Mapping[int, float]) -> float:
    if example.e_form is not None:
        return example.e_form
    composition = example.crystal.composition
    assert example.total is not None  # noqa: S101 - others have no label and were refused
    return example.total - sum(n * lowest[z] for z, n in composition.items()) / example.crystal.n_atoms


_SAME: Final = 1e-3
"""eV/atom by which two labels of one crystal may differ: files are rounded."""


def _without_twins(
    crystals: Sequence[Crystal], targets: NDArray[np.float64], examples: Sequence[_Example], labels: Sequence[float]
) -> tuple[list[Crystal], NDArray[np.float64]]:
    """Join shards and other sources; a crystal that comes twice is learnt once."""
    kept, energies = list(crystals), targets.tolist()
    known = dict(zip((crystal.id for crystal in crystals), energies, strict=True))
    for example, label in zip(examples, labels, strict=True):
        before = known.get(example.crystal.id)
        if before is not None and abs(before - label) > _SAME:
            raise InvalidInput(
                f"{example.label}: its formation energy is {label:g} eV/atom, and {before:g} where the same crystal comes before; keep one"
            )
        if before is None:
            known[example.crystal.id] = label
            kept.append(example.crystal)
            energies.append(label)
    return kept, np.array(energies, dtype=np.float64)


def labelled_formulas(paths: Sequence[Path], *, energy_key: str = "") -> LabelledFormulas:
    """Read the lowest energies of every formula from tables of formulas, or crystals as `labelled_crystals` reads them.

    Raises InvalidInput naming file and row where a formula or an energy cannot be used.
    """
    tables = [path for path in paths if path.suffix.lower() == ".parquet" and not energy_key]
    named = [path for path in paths if path not in tables and _names_formulas(path)]
    crystals = [path for path in paths if path not in (*tables, *named)]
    rows: list[tuple[str, NDArray[np.float64]]] = []
    for path in named:
        rows += _formula_rows(path)
    if crystals:
        found, energies = labelled_crystals(crystals, energy_key=energy_key)
        rows += [(one.reduced_formula, np.array([energy, np.nan])) for one, energy in zip(found, energies, strict=True)]
    if tables:
        read = read_labelled_formulas(tables)
        rows += zip(read.formulas, read.targets, strict=True)
    return lowest_labels(rows)


def _names_formulas(path: Path) -> bool:
    """Whether a file is a CSV of formulas without structures."""
    if path.suffix.lower() not in _TABLES or not path.is_file():
        return False
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        names = next(csv.reader(file), [])
    return not {"cif", "structure"} & set(names) and bool({"formula", str(Quantity.REDUCED_FORMULA)} & set(names))


def _formula_rows(path: Path) -> Iterable[tuple[str, NDArray[np.float64]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})") from None
    for line, row in enumerate(rows, start=2):
        if None in row:
            raise InvalidInput(f"{path}: line {line} has more cells than the header; write commas within a cell in quotes")
        formula = row.get(str(Quantity.REDUCED_FORMULA)) or row.get("formula")
        labels: dict[str, Any] = {str(name): _cell(path, line, str(name), row.get(str(name))) for name in TARGETS}
        yield checked_row(f"{path}: line {line}", {str(Quantity.REDUCED_FORMULA): formula, **labels})


def _cell(path: Path, line: int, name: str, text: str | None) -> float | None:
    if text is None or not text.strip():
        return None
    read = number(text)
    if read is None:
        raise InvalidInput(f"{path}: line {line} has {name} = {text[:60]!r}, which is no number")
    return read
