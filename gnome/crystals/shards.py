"""Many crystals in one Parquet file, with columns beside them.

The format of the shipped seeds, of training sets and of exports.  Columns: `lattice` (9 floats, rows are vectors), `atomic_numbers` (n),
`frac_coords` (3 n floats), then any others, named after `gnome.quantities.Quantity`.  The schema's metadata hold a JSON object under
`gnome`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gnome.atomic_write import atomic_write
from gnome.crystals.crystal import Crystal
from gnome.errors import InvalidCrystal, InvalidInput

_STRUCTURE_COLUMNS = ("lattice", "atomic_numbers", "frac_coords")


def write_shard(
    path: Path,
    crystals: Sequence[Crystal],
    columns: Mapping[str, Sequence[Any]] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write crystals and columns of the same length; the file appears whole or not at all."""
    arrays: dict[str, pa.Array] = {
        "lattice": pa.array([crystal.lattice.ravel() for crystal in crystals], pa.list_(pa.float64())),
        "atomic_numbers": pa.array([crystal.atomic_numbers.astype(np.uint8) for crystal in crystals], pa.list_(pa.uint8())),
        "frac_coords": pa.array([crystal.frac_coords.ravel() for crystal in crystals], pa.list_(pa.float64())),
    }
    for name, values in (columns or {}).items():
        if len(values) != len(crystals):
            raise InvalidInput(f"column {name!r} has {len(values)} rows for {len(crystals)} crystals")
        arrays[str(name)] = pa.array(values)
    table = pa.table(arrays).replace_schema_metadata({b"gnome": json.dumps(dict(metadata or {})).encode()})
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_shard(path: Path) -> tuple[list[Crystal], dict[str, list[Any]], dict[str, Any]]:
    """Read crystals, the other columns, and the metadata.

    Raises InvalidInput when the file is missing, is no Parquet file, or lacks the structure columns.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise InvalidInput(f"{path}: no such file") from None
    except (OSError, pa.ArrowException) as error:
        raise InvalidInput(f"{path}: cannot be read as Parquet ({error})") from None
    if missing := [name for name in _STRUCTURE_COLUMNS if name not in table.column_names]:
        raise InvalidInput(f"{path}: no column {', '.join(missing)}; not a shard of crystals")
    if twice := sorted({name for name in table.column_names if table.column_names.count(name) > 1}):
        raise InvalidInput(f"{path}: has several columns named {', '.join(twice)}; keep one")
    structure = [table[name].to_pylist() for name in _STRUCTURE_COLUMNS]
    crystals = []
    for row, (lattice, numbers, coords) in enumerate(zip(*structure, strict=True)):
        try:
            if lattice is None or numbers is None or coords is None:
                raise InvalidInput(f"{path}: row {row} has no structure; leave it out")
            crystals.append(Crystal(np.reshape(lattice, (3, 3)), np.array(numbers), np.reshape(coords, (-1, 3))))
        except (ValueError, TypeError, InvalidCrystal) as error:
            raise InvalidInput(f"{path}: row {row}: {error}; leave it out") from None
    columns = {name: table[name].to_pylist() for name in table.column_names if name not in _STRUCTURE_COLUMNS}
    try:
        metadata = json.loads((table.schema.metadata or {}).get(b"gnome", b"{}"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: its metadata cannot be read ({error})") from None
    return crystals, columns, metadata
