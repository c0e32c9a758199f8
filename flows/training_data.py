"""What an ensemble learns from: crystals with their formation energies, out of any file that this program reads.

A formation energy is taken as a file gives it; from total energies it is taken by the lowest entry of each element among all sources.
Nothing is left out in silence: what cannot be used is an error that names the first of its kind, for an ensemble learns what it is given.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flows.energy_rows import (
    correction,
    family_counted,
    given_e_form,
    is_bare_u,
    is_plain_gga,
    refuse_several_methods,
    total_energy,
    with_energy_under,
)
from flows.plurals import counted
from flows.tables import E_FORM_COLUMNS, FORMULA_COLUMNS, column_of, find_column
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.energy_fields import AGREE, GGA, number, run_family, unread_energies
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


def labelled_crystals(paths: Sequence[Path], *, energy_key: str = "") -> tuple[list[Crystal], NDArray[np.float64]]:
    """Read crystals and their formation energies (n,), eV/atom, from files and folders.

    `energy_key` names the field of total energies, eV a cell (or an atom, where its name ends so), where that is no usual one.
    Raises InvalidInput naming file and entry where a crystal or its energy cannot be used, or energies of several kinds meet.
    """
    crystals, targets, said = _crystals(paths, energy_key)
    _check_meeting(paths, said)
    return crystals, targets


_SAID: Final = (str(Quantity.METHOD), "run_type", "thermo_type")
"""What rows say of what their energies were made with."""
_Said = set[tuple[str, ...]]


def _crystals(paths: Sequence[Path], energy_key: str, n_given: int = 0) -> tuple[list[Crystal], NDArray[np.float64], _Said]:
    """Crystals, formation energies, and what is said of these; `n_given`: rows of other tables that give theirs."""
    shards = [path for path in paths if _is_shard(path) and not energy_key]
    crystals, targets = read_labelled_crystals(shards)
    said = {found for path in shards for found in _said_in(path)}
    others = [path for path in paths if path not in shards]
    if not others:
        return crystals, targets, said
    items = [_under(item, energy_key) for item in _all_usable(others)]
    said |= {_said_of(item.fields) for item in items}
    examples = [_example(item, energy_key) for item in items]
    if any(is_bare_u(item) and example.e_form is None for item, example in zip(items, examples, strict=True)) and any(
        is_plain_gga(item, run_family(item.fields)) for item in items
    ):
        raise InvalidInput(
            f"{_named(others)}: GGA+U energies without corrections stand beside those of GGA, which they never meet; add the corrections"
        )
    labels = _formation_energies(examples, n_given + len(crystals))
    return *_without_twins(crystals, targets, examples, labels), said


def _said_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(value if isinstance(value := row.get(name), str) else "" for name in _SAID)


def _said_in(path: Path) -> _Said:
    """What the rows of a Parquet table say; nothing where it cannot be read, as its reader says better."""
    try:
        names = [name for name in _SAID if name in pq.read_schema(path).names]
        return {_said_of(row) for row in pq.read_table(path, columns=names).to_pylist()} if names else {("",) * len(_SAID)}
    except (OSError, pa.ArrowException):
        return set()


def _named(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))[:200]


def _check_meeting(paths: Sequence[Path], said: _Said) -> None:
    """Refuse what an import under one method refuses: several methods, and run types of several families."""
    rows = [dict(zip(_SAID, one, strict=True)) for one in sorted(said)]
    try:
        refuse_several_methods(rows)
        families = {family_counted(run_family(row)) for row in rows}
    except (InvalidInput, InvalidCrystal) as error:
        raise InvalidInput(f"{_named(paths)}: {error}") from None
    if len(families) > 1:
        silent = f" (rows that do not say theirs count as {GGA})" if any(not run_family(row) for row in rows) else ""
        raise InvalidInput(
            f"{_named(paths)}: hold energies of run types that never meet, {' and '.join(sorted(families))}{silent}; "
            "train on one of them"
        )


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


def _under(item: ReadCrystal, energy_key: str) -> ReadCrystal:
    """Take the total energy from the field named, if one is."""
    try:
        run_family(item.fields)
        return with_energy_under(item, energy_key) if energy_key else item
    except InvalidCrystal as error:
        raise InvalidInput(f"{item.label}: {error}") from None


def _example(item: ReadCrystal, energy_key: str) -> _Example:
    stated, total = given_e_form(item), total_energy(item)
    if stated is None and total is None:
        unread = unread_energies(item.fields)
        beside = f"; it has {', '.join(unread)}: --energy-key reads one of them as total energies" if unread else ""
        wanted = energy_key or f"{Quantity.E_FORM_PER_ATOM} or {Quantity.ENERGY_PER_ATOM}"
        raise InvalidInput(f"{item.label}: no {wanted}{beside}; an ensemble learns from energies")
    return _Example(item.label, item.crystal, stated, None if total is None else total + correction(item))


def _formation_energies(examples: Sequence[_Example], n_before: int) -> list[float]:
    """Formation energies, as given where all have them, else from the elements; `n_before`: rows of tables, which have them."""
    if some := [example for example in examples if example.e_form is None]:
        _check_one_scale(examples, some[0], n_before)
        examples = [replace(example, e_form=None) for example in examples]
    lowest: dict[int, float] = {}
    for example in examples:
        if example.total is not None and len(example.crystal.composition) == 1:
            (z,) = example.crystal.composition
            lowest[z] = min(example.total, lowest.get(z, np.inf))
    lacking = {z for example in examples if example.e_form is None for z in example.crystal.composition} - lowest.keys()
    if lacking:
        raise InvalidInput(
            f"no entry of {', '.join(SYMBOLS[z] for z in sorted(lacking))} among the sources, of whose elements formation energies are "
            f"taken; add the elements' entries of the same method, or a column {Quantity.E_FORM_PER_ATOM}"
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


def _check_one_scale(examples: Sequence[_Example], example: _Example, n_before: int) -> None:
    """Refuse formation energies as given beside one that would be taken from the elements of the sources."""
    given = next((other for other in examples if other.total is None), None)
    if given is not None or n_before:
        where = given.label if given is not None else f"{counted(n_before, 'row')} of tables"
        raise InvalidInput(
            f"{example.label}: it has a total energy alone, and {where} a formation energy alone; the two never meet, for their "
            f"elements may be others: give all a column {Quantity.E_FORM_PER_ATOM}, or train on one kind"
        )


def _formation_energy(example: _Example, lowest: Mapping[int, float]) -> float:
    if example.e_form is not None:
        return example.e_form
    composition = example.crystal.composition
    assert example.total is not None  # noqa: S101 - others have no label and were refused
    return example.total - sum(n * lowest[z] for z, n in composition.items()) / example.crystal.n_atoms


def _without_twins(
    crystals: Sequence[Crystal], targets: NDArray[np.float64], examples: Sequence[_Example], labels: Sequence[float]
) -> tuple[list[Crystal], NDArray[np.float64]]:
    """Join shards and other sources; a crystal that comes twice is learnt once."""
    kept, energies = list(crystals), targets.tolist()
    known = dict(zip((crystal.id for crystal in crystals), energies, strict=True))
    for example, label in zip(examples, labels, strict=True):
        before = known.get(example.crystal.id)
        if before is not None and abs(before - label) > AGREE:
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
    said = {found for path in tables for found in _said_in(path)}
    for path in named:
        for row, labels in _formula_rows(path):
            said.add(_said_of(row))
            rows.append(labels)
    if tables:
        read = read_labelled_formulas(tables)
        rows += zip(read.formulas, read.targets, strict=True)
    if crystals:
        found, energies, of_crystals = _crystals(crystals, energy_key, len(rows))
        said |= of_crystals
        rows += [(one.reduced_formula, np.array([energy, np.nan])) for one, energy in zip(found, energies, strict=True)]
    _check_meeting(paths, said)
    return lowest_labels(rows)


def _names_formulas(path: Path) -> bool:
    """Whether a file is a CSV of formulas without structures."""
    if path.suffix.lower() not in _TABLES or not path.is_file():
        return False
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        names = next(csv.reader(file), [])
    return not {"cif", "structure"} & set(names) and any(find_column(path, names, (name,)) for name in FORMULA_COLUMNS)


def _formula_rows(path: Path) -> Iterable[tuple[dict[str, str], tuple[str, NDArray[np.float64]]]]:
    """Yield what a row says of its method, and its formula with its labels."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            names, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})") from None
    column = column_of(path, names, FORMULA_COLUMNS)
    targets = {
        str(name): find_column(path, names, E_FORM_COLUMNS if name == Quantity.E_FORM_PER_ATOM else (str(name),))
        for name in TARGETS
    }
    said = {name: find_column(path, names, (name,)) for name in _SAID}
    for line, row in enumerate(rows, start=2):
        if None in row:
            raise InvalidInput(f"{path}: line {line} has more cells than the header; write commas within a cell in quotes")
        labels: dict[str, Any] = {name: _cell(path, line, own, row[own]) for name, own in targets.items() if own is not None}
        labelled = checked_row(f"{path}: line {line}", {str(Quantity.REDUCED_FORMULA): row[column], **labels})
        yield {name: row[own] or "" for name, own in said.items() if own is not None}, labelled


def _cell(path: Path, line: int, name: str, text: str | None) -> float | None:
    if text is None or not text.strip():
        return None
    read = number(text)
    if read is None:
        raise InvalidInput(f"{path}: line {line} has {name} = {text[:60]!r}, which is no number")
    return read
