"""Files that are broken, hostile or of another kind: each costs one clear line, and nothing beside it is lost."""

import csv
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter
from pymatgen.io.vasp import Poscar

from gnome.crystals.cif import CifLimits
from gnome.crystals.convert import from_structure
from gnome.crystals.formats import ReadCrystal, ReadLimits, Refusal, read_crystals
from gnome.crystals.shards import write_shard

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])

LITHIUM_HYDRIDE = Structure(Lattice.cubic(4.1), ["Li", "H"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def cif(structure: Structure = SALT) -> str:
    return str(CifWriter(structure))


def poscar(structure: Structure = SALT) -> str:
    return str(Poscar(structure).get_str())


def bomb(n_operations: int, n_sites: int) -> str:
    operations = "\n".join(f"'x+{k / n_operations:.8f}, y, z'" for k in range(n_operations))
    sites = "\n".join(f"Na{k} Na {k / n_sites:.4f} {(k * 0.37) % 1:.4f} {(k * 0.61) % 1:.4f} 1" for k in range(n_sites))
    cell = (
        "\n".join(f"_cell_length_{axis} 60" for axis in "abc")
        + "\n"
        + "\n".join(f"_cell_angle_{angle} 90" for angle in ("alpha", "beta", "gamma"))
    )
    columns = "\n".join(f"_atom_site_{name}" for name in ("label", "type_symbol", "fract_x", "fract_y", "fract_z", "occupancy"))
    return f"data_bomb\n{cell}\nloop_\n_symmetry_equiv_pos_as_xyz\n{operations}\nloop_\n{columns}\n{sites}\n"


def refusal(path: Path, limits: ReadLimits | None = None) -> Refusal:
    (item,) = read_crystals(path, limits)
    assert isinstance(item, Refusal)
    assert path.name in item.label, "the label names the file"
    assert "\n" not in item.message, "one line"
    return item


def scaled(structure: Structure, factor: float) -> Structure:
    return Structure(Lattice(structure.lattice.matrix * factor), structure.species, structure.frac_coords)


BROKEN: list[tuple[str, str, Callable[[], str | bytes]]] = [
    ("empty.cif", "empty", lambda: ""),
    ("garbage.cif", "not_text", lambda: bytes(range(256)) * 40),
    ("latin.cif", "not_text", lambda: cif().encode() + b"# caf\xe9\xff\n"),
    ("prose.cif", "malformed", lambda: "This is not a CIF at all.\n" * 20),
    ("truncated.cif", "malformed", lambda: cif()[:150]),
    ("half the atoms.cif", "formula_mismatch", lambda: cif()[: cif().rindex("Cl4")].rsplit("\n", 1)[0] + "\n"),
    ("deuterium.cif", "isotope", lambda: cif(LITHIUM_HYDRIDE).replace(" H ", " D ").replace("H1", "D1")),
    ("lithium-6.cif", "isotope", lambda: cif(LITHIUM_HYDRIDE).replace(" Li ", " 6Li ")),
    ("negative.cif", "malformed", lambda: cif().replace("_cell_length_a   ", "_cell_length_a   -")),
    ("sheared.cif", "malformed", lambda: cif().replace("'x, y, z'", "'x+y, y, z'")),
    ("program.cif", "malformed", lambda: cif().replace("'x, y, z'", "'__import__(1), y, z'")),
    ("disorder.cif", "disordered", lambda: cif(Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]]))),
    ("overlap.cif", "overlap", lambda: cif(Structure(Lattice.cubic(5), ["Na", "Cl"], [[0, 0, 0], [0.01, 0, 0]]))),
    ("superheavy.vasp", "unsupported_element", lambda: poscar().replace("Na", "Og")),
    ("nan.vasp", "not_finite", lambda: "nan\n1.0\nnan 0 0\n0 4 0\n0 0 4\nNa Cl\n1 1\ndirect\n0 0 0\n0.5 0.5 0.5\n"),
    ("dense.vasp", "volume", lambda: poscar(scaled(SALT, 0.2))),
    ("flat.vasp", "volume", lambda: "flat\n1.0\n4 0 0\n0 4 0\n0 0 0\nNa Cl\n1 1\ndirect\n0 0 0\n0.5 0.5 0.5\n"),
    ("truncated.vasp", "truncated", lambda: "\n".join(poscar().splitlines()[:11])),
    ("nameless.vasp", "malformed", lambda: "nameless\n1.0\n4 0 0\n0 4 0\n0 0 4\n1 1\ndirect\n0 0 0\n0.5 0.5 0.5\n"),
    ("announces.vasp", "too_many_atoms", lambda: poscar().replace("4 4", "999999999999 4")),
    ("truncated.extxyz", "truncated", lambda: '3\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3\nNa 0 0 0\n'),
    ("molecule.xyz", "not_periodic", lambda: "2\nProperties=species:S:1:pos:R:3\nNa 0 0 0\nCl 2 2 2\n"),
    ("announces.extxyz", "too_many_atoms", lambda: "999999999\n"),
    ("truncated.json", "malformed", lambda: json.dumps(SALT.as_dict())[:200]),
    ("deep.json", "malformed", lambda: "[" * 200_000),
    ("list of numbers.json", "malformed", lambda: "[7]"),
    (
        "nan.json",
        "not_finite",
        lambda: json.dumps({"lattice": [[float("nan")] * 3] * 3, "atomic_numbers": [1], "frac_coords": [[0] * 3]}),
    ),
    ("no cif.csv", "malformed", lambda: "id,formula\n1,NaCl\n"),
    ("garbage.parquet", "malformed", lambda: b"PAR1" + bytes(range(256))),
    ("notes.docx", "unknown_format", lambda: "x"),
]


@pytest.mark.parametrize(("name", "reason", "content"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_a_broken_file_is_one_clear_refusal(tmp_path: Path, name: str, reason: str, content: Callable[[], str | bytes]) -> None:
    text = content()
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal(path).reason == reason


def test_a_big_file_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "big.vasp").write_text(poscar() + " " * 1000)
    assert refusal(tmp_path / "big.vasp", ReadLimits(max_text_bytes=1000)).reason == "too_large"


def test_a_symmetry_bomb_is_refused_before_it_is_expanded(tmp_path: Path) -> None:
    (tmp_path / "bomb.cif").write_text(bomb(1200, 60))
    started = time.monotonic()
    assert refusal(tmp_path / "bomb.cif").reason == "too_large"
    assert time.monotonic() - started < 20
    (tmp_path / "slow.cif").write_text(bomb(900, 60))
    started = time.monotonic()
    assert refusal(tmp_path / "slow.cif", ReadLimits(cif=CifLimits(max_product=60_000))).reason != "too_large"
    assert time.monotonic() - started < 20, "what is expanded is expanded at once"
    (tmp_path / "wide.cif").write_text(bomb(2_000, 1))
    assert "2000 symmetry operations, the limit is 1536" in refusal(tmp_path / "wide.cif").message


def test_json_names_no_module_that_is_then_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"@module": "this", "@class": "s", "structure": {"@module": "this", "@class": "s"}}
    (tmp_path / "hostile.json").write_text(json.dumps(record))
    assert refusal(tmp_path / "hostile.json").reason == "malformed"
    assert "Zen" not in capsys.readouterr().out


def test_an_absurd_energy_is_refused(tmp_path: Path) -> None:
    record = {"structure": SALT.as_dict(), "entry_id": "x", "energy": -1e9, "correction": 0.0}
    (tmp_path / "absurd.json").write_text(json.dumps(record))
    (item,) = read_crystals(tmp_path / "absurd.json")
    assert isinstance(item, Refusal)
    assert item.reason == "energy"


def test_one_bad_structure_in_a_folder_of_a_thousand(tmp_path: Path) -> None:
    text = poscar()
    for number in range(1000):
        (tmp_path / f"{number:04d}.vasp").write_text(text if number != 500 else text[:60])
    items = list(read_crystals(tmp_path))
    refused = [item for item in items if isinstance(item, Refusal)]
    assert len(items) == 1000
    assert [Path(item.label).name for item in refused] == ["0500.vasp"]


def test_a_bad_row_or_line_costs_only_itself(tmp_path: Path) -> None:
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "cif"], ["a", cif()], ["b", "nonsense"], ["c", ""], ["d", cif()]])
    good = json.dumps(SALT.as_dict())
    (tmp_path / "lines.jsonl").write_text(f"{good}\n{{oops\n{good}\n")
    frame = '2\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3\nNa 0 0 0\nCl 2 2 2\n'
    (tmp_path / "frames.extxyz").write_text(frame + frame.replace("Cl 2", "Xy 2") + frame)
    outcomes = {
        name: [isinstance(item, ReadCrystal) for item in read_crystals(tmp_path / name)]
        for name in ("table.csv", "lines.jsonl", "frames.extxyz")
    }
    assert outcomes == {
        "table.csv": [True, False, False, True],
        "lines.jsonl": [True, False, True],
        "frames.extxyz": [True, False, True],
    }


def test_too_many_structures_stop_the_reading(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text((json.dumps(SALT.as_dict()) + "\n") * 5)
    items = list(read_crystals(tmp_path / "lines.jsonl", ReadLimits(max_structures=3)))
    assert [isinstance(item, ReadCrystal) for item in items] == [True, True, True, False]


def test_what_is_no_file_in_a_folder_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "salt.cif").write_text(cif())
    (elsewhere / "salt.cif").write_text(cif())
    (folder / "linked.cif").symlink_to(elsewhere / "salt.cif")
    (folder / "lost.cif").symlink_to(tmp_path / "nowhere.cif")
    (folder / "more").symlink_to(elsewhere)
    os.mkfifo(folder / "pipe.cif")
    items = list(read_crystals(folder))
    good = [Path(item.label).name for item in items if isinstance(item, ReadCrystal)]
    bad = {Path(item.label).name: item.message for item in items if isinstance(item, Refusal)}
    assert good == ["linked.cif", "salt.cif"]
    assert set(bad) == {"lost.cif", "more", "pipe.cif"}
    assert bad["lost.cif"] == "a link to nothing"
    assert "name that folder itself" in bad["more"]
    assert bad["pipe.cif"] == "neither a file nor a folder"


def test_what_a_file_calls_itself_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    names = ["\x1b[2Jcleared", "line\nbreak", "x" * 5000, "\ud800"]
    (tmp_path / "odd.json").write_text(json.dumps([{"entry_id": name, "structure": {}} for name in names]))
    labels = [item.label for item in read_crystals(tmp_path / "odd.json")]
    assert labels[:2] == ["\\x1b[2Jcleared", "line\\nbreak"]
    assert all(label.isprintable() and len(label) <= 200 for label in labels)


def outcomes(path: Path) -> list[str]:
    """What came of each structure: its reason, or `read`."""
    return [item.reason if isinstance(item, Refusal) else "read" for item in read_crystals(path)]


def test_a_bad_record_costs_itself_and_not_those_after_it(tmp_path: Path) -> None:
    good = json.dumps({"structure": SALT.as_dict()}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, b'{"x": ' + b"9" * 5000 + b"}", b'{"x": "\xe9"}', good]))
    frame = '1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3 pbc="T T T"\nNa 0 0 0\n'
    (tmp_path / "b.extxyz").write_text(frame + frame.replace("1\n", "0\n", 1) + frame)
    rows = io.StringIO()
    csv.writer(rows).writerows([["id", "cif"], ["one", cif()], ["caf\udce9", cif()], ["two", cif() + cif()], ["three", cif()]])
    (tmp_path / "c.csv").write_bytes(rows.getvalue().encode(errors="surrogateescape"))
    assert outcomes(tmp_path / "a.jsonl") == ["read", "malformed", "malformed", "read"]
    assert outcomes(tmp_path / "b.extxyz")[0] == "read"
    assert "empty" in outcomes(tmp_path / "b.extxyz")
    assert outcomes(tmp_path / "c.csv") == ["read", "not_text", "malformed", "read"]


def test_what_was_not_read_of_a_file_is_said(tmp_path: Path) -> None:
    rows = io.StringIO()
    csv.writer(rows).writerows([["id", "cif"], ["one", cif()], ["two", cif()], ["endless", "x" * 3_000_000], ["three", cif()]])
    (tmp_path / "a.csv").write_text(rows.getvalue())
    salt = from_structure(SALT)
    write_shard(tmp_path / "b.parquet", [salt] * 3000, {"id": [f"{i:>60}" for i in range(3000)]})
    table = pq.read_table(tmp_path / "b.parquet")
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=1000, write_page_checksum=True, compression="none")
    damaged = bytearray((tmp_path / "b.parquet").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "b.parquet").write_bytes(damaged)
    for name, n_read in (("a.csv", 2), ("b.parquet", 1000)):
        *read, last = read_crystals(tmp_path / name)
        assert [type(item) for item in read] == [ReadCrystal] * n_read
        assert isinstance(last, Refusal)
        assert f"; {n_read} entries came before this, the rest of the file was not read" in last.message
    (tmp_path / "c.jsonl").write_text("x" * 3_000_000 + "\n{}\n")
    assert "the rest of the file was not read" in refusal(tmp_path / "c.jsonl").message


def test_a_packed_table_may_hold_cifs(tmp_path: Path) -> None:
    columns = {"id": ["one", "two", "three"], "cif": [cif(), None, cif()], "e_form_per_atom": [0.0, 1.0, None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert outcomes(tmp_path / "a.parquet") == ["read", "malformed", "read"]
    first, _, third = read_crystals(tmp_path / "a.parquet")
    assert isinstance(first, ReadCrystal)
    assert isinstance(third, ReadCrystal)
    pq.write_table(pa.table([["x"], ["y"]], names=["cif", "cif"]), tmp_path / "b.parquet")
    assert "several columns named cif" in refusal(tmp_path / "b.parquet").message
    assert (first.label, first.fields["e_form_per_atom"], third.fields["e_form_per_atom"]) == ("one", 0.0, None)


def test_what_holds_no_structure_is_said(tmp_path: Path) -> None:
    for name, text in (
        ("a.jsonl", "\n\n"),
        ("b.csv", "id,cif\n"),
        ("c.json", "[]"),
        ("d.json", '{"entries": []}'),
        ("e.xyz", "\n"),
    ):
        (tmp_path / name).write_text(text)
    assert outcomes(tmp_path) == ["empty"] * 5


def test_legal_spellings_are_read(tmp_path: Path) -> None:
    (tmp_path / "capital.cif").write_text(cif().replace("data_", "DATA_"))
    (tmp_path / "old_mac.cif").write_bytes(cif().replace("\n", "\r").encode())
    (tmp_path / "mark.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(SALT.as_dict()).encode())
    (tmp_path / "two.cif").write_text(cif() + cif().replace("data_", "  data_").replace("5.64", "5.65"))
    (tmp_path / "POSCAR").write_text(poscar() + "\n" + "0 0 0\n" * 8)  # velocities
    assert outcomes(tmp_path) == ["read"] * 6


def test_what_would_be_read_in_part_is_refused(tmp_path: Path) -> None:
    entry = {"energy": -28.0, "composition": {"Na": 8, "Cl": 8}, "structure": SALT.as_dict()}
    plain = {"lattice": [[4, 0, 0], [0, 4, 0], [0, 0, 4]], "frac_coords": [[0, 0, 0]]}
    for name, text, reason in (
        ("POSCAR_more", poscar() + "0.3 0.3 0.3\n", "malformed"),
        ("POSCAR_twice", poscar() + poscar(), "malformed"),
        ("POSCAR_extra", poscar().replace("Na Cl", "Na Cl K"), "malformed"),
        ("POSCAR_negative", poscar().replace("4 4", "4 -4"), "malformed"),
        ("a.json", json.dumps(entry), "formula_mismatch"),
        ("b.json", json.dumps({**entry, "energy": "-7.0"}), "energy"),
        ("c.json", json.dumps({**plain, "atomic_numbers": [11.9]}), "malformed"),
        ("d.json", json.dumps({**plain, "atomic_numbers": [True]}), "malformed"),
    ):
        (tmp_path / name).write_text(text)
        assert outcomes(tmp_path / name) == [reason], name
