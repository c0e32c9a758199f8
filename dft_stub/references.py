"""Files of elemental references, and those that ship."""

import json
from pathlib import Path

from gnome.atomic_write import atomic_write
from gnome.crystals.crystal import Crystal
from gnome.crystals.shards import read_shard
from gnome.errors import EvaluatorUnavailable, InvalidInput
from gnome.shipped import shipped_data
from gnome.stability.method import Method
from gnome.stability.references import ElementalReferences


def read_references(path: Path) -> ElementalReferences:
    """Read elemental references; raises EvaluatorUnavailable when the file is missing or is something else."""
    try:
        return ElementalReferences.from_dict(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError, InvalidInput, AttributeError, KeyError, TypeError) as error:
        raise EvaluatorUnavailable(f"{path}: no elemental references there ({error})") from None


def shipped_references() -> ElementalReferences:
    """CHGNet's references, from the shipped seeds."""
    return read_references(shipped_data() / "references.json")


def shipped_ground_states() -> dict[int, list[Crystal]]:
    """Known forms of each element among the shipped seeds, by atomic number; where a code's own references start from."""
    forms: dict[int, list[Crystal]] = {}
    for crystal in read_shard(shipped_data() / "seeds.parquet")[0]:
        if len(crystal.composition) == 1:
            forms.setdefault(int(crystal.atomic_numbers[0]), []).append(crystal)
    return forms


def write_references(path: Path, references: ElementalReferences, method: Method) -> None:
    """Keep references with the full record of their method; the file appears whole or not at all."""
    text = json.dumps({**references.to_dict(), "method_record": method.to_dict()}, indent=1)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n")
