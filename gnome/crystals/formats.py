"""Bounded readers of crystals: CIF, POSCAR, extxyz, JSON entries, CSV with a `cif` column, Parquet shards, `.gz` of them, and folders.

    for item in read_crystals(Path("incoming")):
        if isinstance(item, Refusal): ...       # label, reason code, one-line message
        else: ...                               # label, crystal, fields

A structure that cannot be used costs itself and nothing else.  Nothing a file says is executed: JSON is plain JSON with the fields read by
name, never pymatgen's own decoder, which imports whatever module a file names.
"""

import csv
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gnome.crystals.cif import CifLimits, read_block, split_blocks
from gnome.crystals.cif_energies import cif_energies
from gnome.crystals.crystal import Crystal
from gnome.crystals.energy_fields import with_own_names
from gnome.crystals.entries import NUMERIC_FIELDS, check_count, read_entry
from gnome.crystals.extxyz import crystal_of, read_blocks
from gnome.crystals.poscar import read_poscar
from gnome.crystals.unpacking import is_packed, unpacked
from gnome.crystals.validity import DEFAULT_GATE, GateSettings, check_crystal
from gnome.errors import InvalidCrystal, InvalidInput

_LABELS: Final = ("id", "material_id", "entry_id", "label", "name")


@dataclass(frozen=True, kw_only=True)
class ReadLimits:
    """How much a file may ask for.

    `max_text_bytes` bounds one structure's text (a CIF or POSCAR file, a cell of a table, a line of JSON), `max_file_bytes` a file of many;
    `max_atoms` what one structure may list before anything is built.  `max_energy_per_atom` eV/atom bounds absolute energies.
    """

    max_text_bytes: int = 2_000_000
    max_file_bytes: int = 4 * 2**30
    max_json_bytes: int = 512 * 2**20
    max_structures: int = 5_000_000
    max_atoms: int = 5_000
    max_energy_per_atom: float = 5e4
    cif: CifLimits = field(default_factory=CifLimits)


@dataclass(frozen=True, kw_only=True)
class ReadCrystal:
    """A crystal that was read, what it was called, and what stood beside it."""

    label: str
    crystal: Crystal
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Something that was not read: what it was called, a stable `reason` code, and what is wrong and what to do.

    Control characters in what a file calls itself are written out, and long names are cut.
    """

    label: str
    reason: str
    message: str

    def __post_init__(self) -> None:
        """Make the texts fit to be shown."""
        object.__setattr__(self, "label", printable(self.label, MAX_LABEL))
        object.__setattr__(self, "message", printable(self.message, MAX_LABEL + 400))


MAX_LABEL: Final = 200
"""Characters of a label that are shown; the end of a path tells more than its beginning."""


def printable(text: str, limit: int) -> str:
    """Write out what a terminal would act upon, and keep the ends of what is too long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= limit else f"{shown[: limit // 3]}...{shown[-(limit - limit // 3 - 3) :]}"


ReadItem = ReadCrystal | Refusal
_Draft = tuple[str, Callable[[], tuple[Crystal, dict[str, Any]]]]
"""A label, and what makes the crystal and its fields; it may raise InvalidCrystal."""


def read_crystals(
    path: Path, limits: ReadLimits | None = None, *, gate: GateSettings = DEFAULT_GATE, elements: frozenset[int] | None = None
) -> Iterator[ReadItem]:
    """Read a file or a folder (files in the order of their names, hidden ones left out), one item a structure.

    Raises InvalidInput when the path does not exist; everything else is an item.
    """
    limits = limits or ReadLimits()
    if not path.exists():
        raise InvalidInput(f"{path}: no such file or folder")
    count = 0
    for file in _files(path):
        before = count
        for label, make in _drafts(file, limits):
            count += 1
            if count > limits.max_structures:
                yield Refusal(
                    label=label, reason="too_many", message=f"{path}: more than {limits.max_structures} structures; split it"
                )
                return
            yield _item(label, make, limits, gate, elements)
        if count == before:
            yield Refusal(label=str(file), reason="empty", message="holds no structure")


def _item(
    label: str,
    make: Callable[[], tuple[Crystal, dict[str, Any]]],
    limits: ReadLimits,
    gate: GateSettings,
    elements: frozenset[int] | None,
) -> ReadItem:
    label = printable(label, 2 * MAX_LABEL)
    try:
        crystal, fields = make()
        fields = with_own_names(fields, crystal.n_atoms)
        check_crystal(crystal, gate, elements=elements)
        _check_energies(fields, limits)
    except InvalidCrystal as error:
        return Refusal(label=label, reason=error.reason, message=" ".join(str(error).split()))
    except MemoryError:
        raise
    except Exception as error:  # whatever a library raises over a file is the file's fault, and costs this structure alone
        text = " ".join(str(error).split())[:200] or type(error).__name__
        return Refusal(label=label, reason="malformed", message=f"cannot be read ({text}); check the file")
    return ReadCrystal(label=label, crystal=crystal, fields=fields)


def _check_energies(fields: Mapping[str, Any], limits: ReadLimits) -> None:
    for name in NUMERIC_FIELDS & fields.keys():
        value = fields[name]
        if value is None:
            continue
        usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= limits.max_energy_per_atom
        if not usable:  # nor what is not a number
            raise InvalidCrystal(
                "energy", f"{name} is {value}, expected a number of at most {limits.max_energy_per_atom:g} eV/atom"
            )


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    found = [
        file
        for file in sorted(path.rglob("*"))
        if not any(part.startswith(".") for part in file.parts[len(path.parts) :]) and (file.is_symlink() or not file.is_dir())
    ]
    if not found:
        raise InvalidInput(f"{path}: the folder holds no file")
    yield from found


def _drafts(path: Path, limits: ReadLimits) -> Iterator[_Draft]:
    """Choose the reader by the file's name; a file that cannot be opened at all, or read to its end, has one refused draft for that."""
    n_read = 0
    try:
        _check_kind(path)
        plain = path.with_suffix("") if is_packed(path) else path
        reader, limit = _reader(plain, limits)
        _check_size(path.stat().st_size, limit)
        with unpacked(path, limit) as readable:
            _check_size(readable.stat().st_size, limit)
            for label, make in reader(readable, limits):
                n_read += 1
                yield label.replace(str(readable), str(path)), make
    except (InvalidCrystal, OSError, ValueError, csv.Error, pa.ArrowException) as error:
        yield str(path), _refuse(error, n_read)


def _check_kind(path: Path) -> None:
    if path.is_dir():
        raise InvalidCrystal("not_a_file", "a link to a folder, which is not followed; name that folder itself")
    if not path.is_file():
        is_link = path.is_symlink() and not path.exists()
        raise InvalidCrystal("not_a_file", "a link to nothing" if is_link else "neither a file nor a folder")


def _check_size(size: int, limit: int) -> None:
    if size == 0:
        raise InvalidCrystal("empty", "the file is empty")
    if size > limit:
        raise InvalidCrystal("too_large", f"{size} bytes, the limit is {limit}; split it or raise the limit")


def _refuse(error: Exception, n_read: int = 0) -> Callable[[], tuple[Crystal, dict[str, Any]]]:
    """Refuse a draft, or what a file has behind so many."""
    reason = error.reason if isinstance(error, InvalidCrystal) else "malformed"
    text = str(error) if isinstance(error, InvalidCrystal) else f"cannot be read ({error}); check the file"
    behind = f"; {n_read} entries came before this, the rest of the file was not read" if n_read else ""

    def make() -> tuple[Crystal, dict[str, Any]]:
        raise InvalidCrystal(reason, text + behind)

    return make


def _reader(path: Path, limits: ReadLimits) -> tuple[Callable[[Path, ReadLimits], Iterator[_Draft]], int]:
    """Choose the reader: by a known ending, then by a name that VASP and its tools give (POSCAR.cif is a CIF)."""
    suffix = path.suffix.lower()
    readers: dict[str, tuple[Callable[[Path, ReadLimits], Iterator[_Draft]], int]] = {
        ".cif": (_read_cif, limits.max_text_bytes * 10),
        ".extxyz": (_read_extxyz, limits.max_file_bytes),
        ".xyz": (_read_extxyz, limits.max_file_bytes),
        ".json": (_read_json, limits.max_json_bytes),
        ".jsonl": (_read_json_lines, limits.max_file_bytes),
        ".csv": (_read_csv, limits.max_file_bytes),
        ".parquet": (_read_parquet, limits.max_file_bytes),
        ".vasp": (_read_poscar, limits.max_text_bytes),
        ".poscar": (_read_poscar, limits.max_text_bytes),
        ".contcar": (_read_poscar, limits.max_text_bytes),
    }
    if suffix in readers:
        return readers[suffix]
    if _POSCAR_NAME.search(path.name):
        return _read_poscar, limits.max_text_bytes
    raise InvalidCrystal(
        "unknown_format",
        f"not a known kind of file; there are {', '.join(sorted(readers))}, POSCAR and CONTCAR, each also with .gz",
    )


_POSCAR_NAME: Final = re.compile(r"^(POSCAR|CONTCAR)|(POSCAR|CONTCAR)$|(^|[^a-z])[a-z]?(POSCAR|CONTCAR)([^a-z]|$)", re.IGNORECASE)
"""POSCAR, CONTCAR_relaxed, SPOSCAR, MPOSCAR-001, NaCl_POSCAR, run3-POSCAR.bak."""


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if b"\0" in raw:
        raise InvalidCrystal("not_text", "the file holds zero bytes, so it is no text; is it the right one?")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InvalidCrystal("not_text", f"the file is not text ({error}); is it the right one?") from None


def _read_cif(path: Path, limits: ReadLimits) -> Iterator[_Draft]:
    blocks = split_blocks(_text(path))
    for number, block in enumerate(blocks, start=1):
        label = str(path) if len(blocks) == 1 else f"{path}#{number}"
        yield label, lambda block=block: (_cif(block, limits), cif_energies(block))  # type: ignore[misc]


def _cif(text: str, limits: ReadLimits) -> Crystal:
    if len(text) > limits.max_text_bytes:
        raise InvalidCrystal("too_large", f"{len(text)} characters in one structure, the limit is {limits.max_text_bytes}")
    return read_block(text, limits.cif)


def _read_poscar(path: Path, limits: ReadLimits) -> Iterator[_Draft]:
    text = _text(path)
    yield str(path), lambda: (read_poscar(text, max_atoms=limits.max_atoms), {})


def _read_extxyz(path: Path, limits: ReadLimits) -> Iterator[_Draft]:
    blocks = read_blocks(path, max_atoms=limits.max_atoms, max_line=limits.max_text_bytes)
    for number, block in enumerate(blocks, start=1):
        make = _refuse(block) if isinstance(block, InvalidCrystal) else partial(crystal_of, *block)
        yield f"{path}#{number}", make


def _read_json(path: Path, limits: ReadLimits) -> Iterator[_Draft]:
    try:
        document = _json(_text(path))
    except InvalidCrystal:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidCrystal("malformed", f"not valid JSON ({error}); is it complete?") from None
    if isinstance(document, dict) and isinstance(document.get("entries"), list):
        document = document["entries"]
    records = document if isinstance(document, list) else [document]
    for number, record in enumerate(records, start=1):
        yield _label(record, f"{path}#{number}" if isinstance(document, list) else str(path)), _entry_maker(record, limits)


def _json(text: str) -> Any:
    """Read JSON; raises ValueError for an object that has a key twice, of which the last would win."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
            raise ValueError(f"the key {twice[:60]!r} twice in one object")
        return made

    return json.loads(text, object_pairs_hook=unique)


def _read_json_lines(path: Path, limits: ReadLimits) -> Iterator[_Draft]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(limits.max_text_bytes + 1):
            number += 1
            label = f"{path}:{number}"
            if len(line) > limits.max_text_bytes:
                message = f"line {number} is over {limits.max_text_bytes} bytes"
                raise InvalidCrystal("too_large", message if number > 1 else f"{message}; the rest of the file was not read")
            if not line.strip():
                continue
            try:
                record = _json(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # of the text or of a number
                yield label, _refuse(InvalidCrystal("malformed", f"not valid JSON ({error})"))
                continue
            yield _label(record, label), _entry_maker(record, limits)


def _label(record: Any, otherwise: str) -> str:
    named = (record.get(key) for key in _LABELS) if isinstance(record, dict) else ()
    return next((str(name) for name in named if isinstance(name, str | int) and str(name)), otherwise)


def _entry_maker(record: Any, limits: ReadLimits) -> Callable[[], tuple[Crystal, dict[str, Any]]]:
    return lambda: read_entry(record, max_atoms=limits.max_atoms)


_CSV_LOCK = threading.Lock()
_HEAD: Final = 4096


def _read_csv(path: Path, limits: ReadLimits) -> Iterator[_Draft]:
    with _CSV_LOCK:  # the module keeps one limit for the whole process
        csv.field_size_limit(max(csv.field_size_limit(), limits.max_text_bytes))
    with path.open("rb") as file:
        if b"\0" in file.read(_HEAD):
            raise InvalidCrystal("not_text", "the file holds zero bytes, as UTF-16 does; save it as UTF-8")
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:  # what is no text is refused row by row
        rows = csv.DictReader(file)
        for name in ("cif", "structure"):
            if (twice := list(rows.fieldnames or ()).count(name)) > 1:
                raise InvalidCrystal("malformed", f"{twice} columns `{name}`; keep one")
        if not {"cif", "structure"} & set(rows.fieldnames or ()):
            raise InvalidCrystal(
                "malformed", f"no column `cif`, nor `structure`; the columns are {', '.join(rows.fieldnames or ['(none)'])[:200]}"
            )
        for number, row in enumerate(rows, start=1):
            yield _label(row, f"{path}#{number}"), lambda row=row: _row(row, limits)  # type: ignore[misc]


def _row(row: dict[str, Any], limits: ReadLimits) -> tuple[Crystal, dict[str, Any]]:
    if None in row:
        raise InvalidCrystal("malformed", "the row has more cells than the header; is its quoting right?")
    column = "cif" if "cif" in row else "structure"
    text = row[column]
    if not isinstance(text, str) or not text:
        raise InvalidCrystal("malformed", "the row has no CIF; is its quoting right?")
    if any(re.search("[\ud800-\udfff]", str(value)) for value in row.values()):
        raise InvalidCrystal("not_text", "the row holds bytes that are not UTF-8")
    is_record = column == "structure" and text.lstrip().startswith("{")
    if not is_record and len(split_blocks(text)) > 1:
        raise InvalidCrystal("malformed", "the cell holds several structures; give each a row")
    fields: dict[str, Any] = {name: value for name, value in row.items() if name != column}
    for name in NUMERIC_FIELDS & fields.keys():
        try:
            fields[name] = None if fields[name] in {None, ""} else float(fields[name])
        except ValueError:
            raise InvalidCrystal("energy", f"{name} is {fields[name]!r}, expected a number") from None
    if is_record:
        return _structure(text, limits), fields
    return _cif(text, limits), fields | {name: value for name, value in cif_energies(text).items() if fields.get(name) is None}


def _structure(text: str, limits: ReadLimits) -> Crystal:
    """Read the JSON record of a structure, as pymatgen writes it, from a cell of a table."""
    try:
        record = _json(text)
    except (ValueError, RecursionError) as error:
        raise InvalidCrystal("malformed", f"`structure` is not valid JSON ({error}); is the row's quoting right?") from None
    return read_entry({"structure": record}, max_atoms=limits.max_atoms)[0]


def _read_parquet(path: Path, limits: ReadLimits) -> Iterator[_Draft]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidCrystal("malformed", f"several columns named {', '.join(twice)}; keep one")
        missing = [name for name in _STRUCTURE if name not in names]
        if missing and "cif" not in names:
            raise InvalidCrystal("malformed", f"no column {', '.join(missing)}, and none named cif; not a table of crystals")
        read = _row if missing else _shard_row
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield _label(row, f"{path}#{number}"), lambda row=row: read(row, limits)  # type: ignore[misc]


_STRUCTURE: Final = ("lattice", "atomic_numbers", "frac_coords")


def _shard_row(row: dict[str, Any], limits: ReadLimits) -> tuple[Crystal, dict[str, Any]]:
    lattice, numbers, coords = (row.pop(name) for name in _STRUCTURE)
    if lattice is None or numbers is None or coords is None:
        raise InvalidCrystal("malformed", f"the row has no {', '.join(_STRUCTURE)}")
    check_count(len(numbers), limits.max_atoms)
    crystal = Crystal(np.reshape(lattice, (3, 3)), np.array(numbers), np.reshape(coords, (-1, 3)))
    return crystal, row
