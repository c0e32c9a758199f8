"""Packed files: read like others, within bounds."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from gnome.crystals import unpacking
from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal, ReadLimits, Refusal, read_crystals
from gnome.crystals.writers import write_crystals

CRYSTALS = [
    ReadCrystal(
        label=f"{a}", fields={"energy_per_atom": -3.0},
        crystal=Crystal.from_symbols([[a, 0, 0], [0, a, 0], [0, 0, a]], ["Cs", "Br"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    )
    for a in (4.1, 4.2)
]  # fmt: skip


def pack(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()
    return packed


@pytest.mark.parametrize("name", ["a.cif", "a.vasp", "POSCAR", "a.extxyz", "a.json", "a.csv", "a.parquet", "a.jsonl", "A.CIF"])
def test_whatever_is_read_is_read_packed(tmp_path: Path, name: str) -> None:
    one_alone = name in {"a.cif", "A.CIF", "a.vasp", "POSCAR"}
    path = tmp_path / name
    written = {"POSCAR": "p.vasp", "A.CIF": "p.cif", "a.jsonl": "p.json"}.get(name, name)
    write_crystals(tmp_path / written, CRYSTALS[: 1 if one_alone else 2])
    if name == "a.jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in json.loads((tmp_path / written).read_text())))
        (tmp_path / written).unlink()
    elif written != name:
        shutil.move(tmp_path / written, path)
    plain = list(read_crystals(path))
    packed = pack(path)
    found = list(read_crystals(tmp_path))
    assert all(isinstance(item, ReadCrystal) for item in found), found
    assert [item.crystal for item in found if isinstance(item, ReadCrystal)] == [
        item.crystal for item in plain if isinstance(item, ReadCrystal)
    ]
    assert [item.label for item in found] == [item.label.replace(str(path), str(packed)) for item in plain]


def refusal(path: Path, limits: ReadLimits | None = None) -> Refusal:
    (item,) = read_crystals(path, limits)
    assert isinstance(item, Refusal)
    assert item.label == str(path)
    return item


def test_a_bomb_is_left_before_it_fills_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "ALWAYS_BYTES", 2 << 20)
    path = tmp_path / "bomb.extxyz.gz"
    path.write_bytes(gzip.compress(b" " * (64 << 20), mtime=0))
    written: list[int] = []
    unpack = unpacking._unpack

    def watched(packed: Path, copy: Path, most: int) -> None:
        try:
            unpack(packed, copy, most)
        finally:
            written.append(copy.stat().st_size)

    monkeypatch.setattr(unpacking, "_unpack", watched)
    assert refusal(path).reason == "too_large"
    assert len(written) == 1
    assert written[0] <= unpacking.MOST_RATIO * path.stat().st_size
    assert refusal(tmp_path / "bomb.extxyz.gz", ReadLimits(max_file_bytes=1 << 20)).reason == "too_large"
    assert written[1] <= 1 << 20


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.cif.gz", b"data_x\n", "malformed"),
        ("a.cif.gz", gzip.compress(b"data_x\n" * 100, mtime=0)[:-20], "malformed"),
        ("a.cif.gz", gzip.compress(b"data_x\n" * 100, mtime=0)[:12] + b"\xff" * 30, "malformed"),
        ("a.cif.gz", gzip.compress(b"", mtime=0), "empty"),
        ("a.cif.gz", b"", "empty"),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), "unknown_format"),
        ("a.gz", gzip.compress(b"x", mtime=0), "unknown_format"),
        (".gz", gzip.compress(b"x", mtime=0), "unknown_format"),
        ("a.cif.gz.gz", gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), "unknown_format"),
    ],
    ids=["not packed", "cut short", "garbled", "empty inside", "empty", "tar", "no format inside", "no name", "packed twice"],
)
def test_what_cannot_be_unpacked_is_one_clear_line(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(path).reason == reason
