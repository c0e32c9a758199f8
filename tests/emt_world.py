"""A small fast world: seven metals under ASE's EMT, some twenty known crystals, rounds of seconds."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

from ase.build import bulk

from flows.evaluating import answers
from flows.importing import Imported, import_crystals
from flows.progress import Silent
from flows.settings import RoundSettings, Settings
from flows.workspace import open_workspace
from gnome.crystals.convert import from_atoms
from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal
from gnome.crystals.shards import write_shard
from gnome.crystals.writers import write_crystals


class Listening(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


FCC = {"Al": 4.05, "Ni": 3.52, "Cu": 3.61, "Pd": 3.89, "Ag": 4.09, "Pt": 3.92, "Au": 4.08}
L1_2 = (
    ("Cu", "Au"),
    ("Au", "Cu"),
    ("Al", "Ni"),
    ("Pt", "Cu"),
    ("Pd", "Cu"),
    ("Ni", "Pt"),
)  # one of the first, three of the second
L1_0 = (("Cu", "Au"), ("Ni", "Pt"), ("Pd", "Cu"))
B2 = (("Ni", "Al"), ("Pd", "Cu"))
SMALL: dict[str, Any] = {"evaluator": "emt", "n_candidates": 60, "n_screened": 20, "budget": 6, "n_scales": 3}


def length(*symbols: str) -> float:
    return sum(FCC[symbol] for symbol in symbols) / len(symbols)


def l1_2(first: str, second: str) -> Crystal:
    a = length(first, second, second, second)
    sites = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    return Crystal.from_symbols([[a, 0, 0], [0, a, 0], [0, 0, a]], [first, second, second, second], sites)


def l1_0(first: str, second: str) -> Crystal:
    a = length(first, second)
    short = a / 2**0.5
    return Crystal.from_symbols([[short, 0, 0], [0, short, 0], [0, 0, a]], [first, second], [[0, 0, 0], [0.5, 0.5, 0.5]])


def b2(first: str, second: str) -> Crystal:
    a = length(first, second) * 0.79
    return Crystal.from_symbols([[a, 0, 0], [0, a, 0], [0, 0, a]], [first, second], [[0, 0, 0], [0.5, 0.5, 0.5]])


def known_crystals() -> dict[str, Crystal]:
    known = {symbol: from_atoms(bulk(symbol, "fcc", a=a)) for symbol, a in FCC.items()}
    known |= {f"{second}3{first}": l1_2(first, second) for first, second in L1_2}
    known |= {f"{first}{second}": l1_0(first, second) for first, second in L1_0}
    return known | {f"{first}{second}-B2": b2(first, second) for first, second in B2}


def write_folder(folder: Path, crystals: dict[str, Crystal]) -> Path:
    """Write one CIF a crystal, under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    write_crystals(folder, [ReadCrystal(label=name, crystal=crystal) for name, crystal in crystals.items()], kind="cif")
    return folder


def settings_in(folder: Path) -> Settings:
    return Settings(database_url=f"sqlite:///{folder / 'gnome.db'}", evaluator="emt", workers=1)


def round_settings(**changes: Any) -> RoundSettings:
    return RoundSettings(**{**SMALL, **changes})


def build_world(folder: Path) -> Imported:
    """Import the known crystals into a new database; its elemental references lie beside it."""
    source = write_folder(folder / "known", known_crystals())
    with open_workspace(settings_in(folder)) as workspace:
        return import_crystals(workspace, source)


def copy_world(world: Path, folder: Path) -> Settings:
    """Copy database and references (a closed SQLite file is one file)."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_in(folder)
    shutil.copy(world / "gnome.db", folder / "gnome.db")
    shutil.copytree(settings_in(world).data_folder, settings.data_folder)
    return settings


_TIMES = {"created_at", "started_at", "finished_at", "cost_seconds", "promoted_at"}


def tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, without times, costs, and who did it in how many attempts."""
    found: dict[str, list[dict[str, Any]]] = {}
    with contextlib.closing(sqlite3.connect(folder / "gnome.db")) as connection:
        connection.row_factory = sqlite3.Row
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for name in sorted(set(names) - {"leases", "alembic_version"}):
            rows = [dict(row) for row in connection.execute(f'SELECT * FROM "{name}"')]
            found[name] = sorted((_lasting(name, row) for row in rows), key=repr)
    return found


def _lasting(table: str, row: dict[str, Any]) -> dict[str, Any]:
    row = {name: value for name, value in row.items() if name not in _TIMES}
    if table == "rounds" and row["summary"]:
        row["summary"] = {k: v for k, v in json.loads(row["summary"]).items() if k not in {"seconds", "cost_seconds"}}
    if table == "ledger":
        result = json.loads(row["result"] or "{}")
        dropped = {"seconds", "n", "failures"} if row["stage"] == "evaluate" else {"seconds"}
        row = {name: row[name] for name in ("round", "stage", "shard", "state", "message")}
        row["result"] = {k: v for k, v in result.items() if k not in dropped}
    if table == "models":
        row["path"] = Path(row["path"]).name
    return row


def write_validation(world: Path, folder: Path) -> Path:
    """Write a validation set labelled by EMT; returns the folder, which stands in for that of the shipped data."""
    unrelaxed = {
        f"{a}3{b}": l1_2(b, a).scaled(1.05)
        for a, b in (("Au", "Ni"), ("Ag", "Au"), ("Pd", "Ni"), ("Cu", "Al"), ("Pt", "Au"), ("Al", "Pd"))
    }
    unrelaxed |= {f"{a}{b}": l1_0(a, b).scaled(0.97) for a, b in (("Ag", "Au"), ("Cu", "Pt"), ("Al", "Pd"), ("Ni", "Cu"))}
    with open_workspace(settings_in(world)) as workspace:
        found = {answer.id: answer for answer in answers(workspace.evaluator, unrelaxed)}
        method = workspace.evaluator.method
    labels = [found[name].e_form_per_atom for name in unrelaxed]
    write_shard(
        folder / "validation.parquet", list(unrelaxed.values()), {"e_form_per_atom": labels}, {"method": method.to_dict()}
    )
    return folder
