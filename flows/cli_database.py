"""Commands that read and fill the database: query, show, import, export."""

import csv
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli import app, make_console, print_json
from flows.plurals import counted
from flows.settings import Settings
from gnome.atomic_write import atomic_write, require_writable
from gnome.errors import InvalidInput
from gnome.quantities import Quantity

FORMATS = ("table", "json", "csv", "cif", "extxyz")
_HOLDING = frozenset({"cif", "extxyz"})
"""Formats that hold structures."""

_COLUMNS = (
    Quantity.ID, Quantity.REDUCED_FORMULA, Quantity.SPACE_GROUP_NUMBER, Quantity.PROTOSTRUCTURE, Quantity.METHOD, Quantity.E_FORM_PER_ATOM,
    Quantity.E_ABOVE_HULL, Quantity.ORIGIN, Quantity.ROUND,
)  # fmt: skip
_LEFT_OUT_FIRST = (
    Quantity.PROTOSTRUCTURE, Quantity.ROUND, Quantity.SPACE_GROUP_NUMBER, Quantity.ORIGIN, Quantity.E_FORM_PER_ATOM,
)  # fmt: skip
"""Columns of the table that a narrow terminal does without, in this order; an id is never cut, so that it can be copied."""

_UNITS = {name.value: name.unit for name in Quantity if name.unit}
_HIDDEN = frozenset({"created_at", "candidate_id", "fingerprint"})

Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


@app.command("query")
def query_command(
    where: Annotated[
        str,
        typer.Argument(
            metavar="FILTER",
            help="OPTIMADE filter; all crystals when empty. Fields of ours: _gnome_origin, _gnome_round, _gnome_e_above_hull, ...",
        ),
    ] = "",
    sort: Annotated[str, typer.Option(help="Fields, by commas; a leading '-' sorts downwards.")] = Quantity.E_ABOVE_HULL.value,
    limit: Annotated[int, typer.Option(help="Most rows to answer.", max=10**9)] = 100,
    form: Annotated[str, typer.Option("--format", help="table, json, csv, cif or extxyz.")] = "table",
    structures: Annotated[
        bool,
        typer.Option("--structures", help="With --format json: lattice (angstrom), species and frac_coords of each crystal."),
    ] = False,
) -> None:
    """Find crystals by an OPTIMADE filter.

    gnome query 'elements HAS "O" AND _gnome_e_above_hull < 0.05' --format json
    """
    from gnome.database.query import count, query, values_asked_for  # noqa: PLC0415
    from gnome.database.store import Store  # noqa: PLC0415

    if form not in FORMATS:
        raise InvalidInput(f"--format {form!r}, expected one of {', '.join(FORMATS)}")
    if structures and form != "json":
        raise InvalidInput(
            f"--structures goes with --format json; --format {form} "
            + ("holds them" if form in _HOLDING else "has no place for them")
        )
    with Store.open(Settings().database, read_only=True) as store:
        rows = query(store, where, sort=sort, limit=limit, with_crystals=structures or form in _HOLDING)
        total = count(store, where)
        values = values_asked_for(store, where) if not total else {}
    if form == "json":
        print_json([_with_structure(row) for row in rows] if structures else rows)
    elif form == "csv":
        _print_csv(rows)
    elif form == "table":
        _print_table(rows, total)
    else:
        from flows.exporting import with_fields  # noqa: PLC0415
        from gnome.crystals.writers import to_cifs, to_extxyz  # noqa: PLC0415

        items = with_fields(rows)
        sys.stdout.write(to_extxyz(items) if form == "extxyz" else to_cifs(items))
    for name, there in values.items():
        sys.stderr.write(f"gnome: no crystal matches; the {name}s here are {', '.join(there) or 'none'}\n")
    if len(rows) < total and form != "table":
        sys.stderr.write(f"gnome: {len(rows)} of {counted(total, 'crystal')} shown; raise --limit for more\n")


def _with_structure(row: dict[str, Any]) -> dict[str, Any]:
    """Put the structure beside the row's columns, as `Structure(lattice, species, frac_coords)` of pymatgen takes it."""
    crystal = row.pop("crystal")
    fields = crystal.to_dict()
    return {
        **row,
        "structure": {"lattice": fields["lattice"], "species": list(crystal.symbols), "frac_coords": fields["frac_coords"]},
    }


def _print_table(rows: list[dict[str, Any]], total: int) -> None:
    from rich.table import Table  # noqa: PLC0415

    from gnome.database.query import short_methods  # noqa: PLC0415

    console = make_console()
    methods = short_methods({row[Quantity.METHOD] for row in rows})
    lines = [{name: _cell(row[name]) for name in _COLUMNS} | {Quantity.METHOD: methods[row[Quantity.METHOD]]} for row in rows]
    widths = {name: max(len(name), *(len(line[name]) for line in lines)) if lines else len(name) for name in _COLUMNS}
    shown = list(_COLUMNS)
    for name in _LEFT_OUT_FIRST:
        if sum(widths[each] + 2 for each in shown) <= console.width + 2:
            break
        shown.remove(name)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in shown:
        table.add_column(
            name.value, overflow="fold", no_wrap=name == Quantity.ID, min_width=widths[name] if name == Quantity.ID else None
        )
    for line in lines:
        table.add_row(*(line[name] for name in shown))
    console.print(table)
    left_out = [name.value for name in _COLUMNS if name not in shown]
    console.print(
        f"{len(rows)} of {counted(total, 'crystal')}"
        + (f"; a wider terminal shows {', '.join(left_out)} too" if left_out else ""),
        soft_wrap=True,
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{round(value, 4) + 0.0:.4f}"  # without the sign of what rounds to nothing
    return "" if value is None else str(value).split(":", 1)[0]


def _print_csv(rows: list[dict[str, Any]]) -> None:
    from gnome.database.crystal_store import SHOWN_COLUMNS  # noqa: PLC0415

    writer = csv.writer(sys.stdout)
    names = [name for name in SHOWN_COLUMNS if name != "versions"]
    writer.writerow(names)
    for row in rows:
        writer.writerow([_competing(row) if name == Quantity.DECOMPOSES_TO else row[name] for name in names])


def _competing(row: dict[str, Any]) -> str:
    from flows.reports import products  # noqa: PLC0415

    return products(row)


@app.command("show")
def show_command(
    crystal_id: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="Id of a crystal, as `gnome query` lists it, or as much of it as tells it from others."
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            help="Label of a method or its beginning, where several know the crystal; the first that stored it otherwise."
        ),
    ] = "",
    lineage: Annotated[bool, typer.Option("--lineage", help="Trace it back to its seed.")] = False,
    as_json: Json = False,
) -> None:
    """Show one crystal: its energies, what it competes with, its structure; with --lineage, where it came from.

    gnome show 3f2a9c0d11e24b7a --lineage   |   gnome show 3f2a9
    """
    from ase.geometry import cell_to_cellpar  # noqa: PLC0415

    from flows.reports import lineage_rows, products  # noqa: PLC0415
    from gnome.database.query import find_id, find_method  # noqa: PLC0415
    from gnome.database.store import Store  # noqa: PLC0415

    with Store.open(Settings().database, read_only=True) as store:
        crystal_id = find_id(store, crystal_id)
        stored = store.crystal(crystal_id, find_method(store, method) if method else None)
        others = [each.row[Quantity.METHOD] for each in store.crystals_by_id([crystal_id])[crystal_id]]
        chain = lineage_rows(store.lineage(crystal_id)) if lineage else []
    if others := [label for label in others if label != stored.row[Quantity.METHOD]]:
        sys.stderr.write(f"gnome: known under {', '.join(others)} too; --method shows it there\n")
    if as_json:
        print_json({**stored.row, "structure": stored.crystal.to_dict(), **({"lineage": chain} if lineage else {})})
        return
    console = make_console()
    for name, value in stored.row.items():
        if name in _HIDDEN:
            continue
        shown = products(stored.row) if name == Quantity.DECOMPOSES_TO else value
        if shown or shown == 0:
            unit = f" {_UNITS[name]}" if name in _UNITS else ""
            console.print(f"{name:>26}", style="bold", end="  ")
            console.print(f"{f'{shown:.5g}' if isinstance(shown, float) else shown}{unit}", soft_wrap=True)
    cell = [f"{number:.4f}" for number in cell_to_cellpar(stored.crystal.lattice)]
    for name, values in (("cell lengths", f"{' '.join(cell[:3])} angstrom"), ("cell angles", f"{' '.join(cell[3:])} degrees")):
        console.print(f"{name:>26}", style="bold", end="  ")
        console.print(values)
    for symbol, coords in zip(stored.crystal.symbols, stored.crystal.frac_coords, strict=True):
        console.print(f"{symbol:>26}  " + " ".join(f"{round(x % 1.0, 5) % 1.0:9.5f}" for x in coords))
    for depth, step in enumerate(chain):
        made = step.get("made_by")
        how = f"{made['generator']} {made['parameters']}, seed {made['seed']}" if made else step["source"] or step["origin"]
        arrow = "" if depth == 0 else "from "
        console.print(f"{'  ' * depth}{arrow}{step['reduced_formula']} {step['id']} ({step['origin']}): {how}", soft_wrap=True)


@app.command("import")
def import_command(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="CIF, POSCAR, extxyz, JSON, CSV, Parquet, also as .gz, or folders of them."),
    ],
    method: Annotated[
        str, typer.Option(help="Name for the method of energies that come with the files; its own hull is kept under it.")
    ] = "",
    evaluator: Annotated[str, typer.Option(help="Relaxes crystals that come without energies.")] = "",
    energy_key: Annotated[
        str,
        typer.Option(
            help="Take the total energy from this field, such as REF_energy: eV per cell, or per atom where it ends so."
        ),
    ] = "",
    run_type: Annotated[
        str,
        typer.Option(
            help="Of energies of several run types, import those of this one, such as R2SCAN; rows that do not say theirs count as it. "
            "GGA+U also lets in GGA beside GGA+U without corrections."
        ),
    ] = "",
    relax: Annotated[
        bool, typer.Option("--relax", help="Relax crystals that come with energies too; the energies are left aside.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write what was refused here, one line each.")] = None,
    as_json: Json = False,
) -> None:
    """Import known crystals: with energies into the hull of their method, without by relaxing them first.

    Total energies need the elements' entries beside them; formation_energy_per_atom (Materials Project) is taken as it is given.

    gnome import mp_entries.json.gz --method mp-2026   |   gnome import my_cifs/ --evaluator chgnet
    """
    from flows.importing import import_crystals  # noqa: PLC0415
    from flows.progress import Bars  # noqa: PLC0415
    from flows.workspace import open_workspace  # noqa: PLC0415

    settings = Settings()
    console = make_console(stderr=True)
    if report is not None:
        for source in sources:
            check_report(report, source)
    with open_workspace(settings, evaluator=evaluator or None, listener=Bars(console)) as workspace:
        done = import_crystals(workspace, *sources, method_name=method, energy_key=energy_key, run_type=run_type, relax=relax)
    lines = [f"{refusal.label}: {refusal.reason}: {refusal.message}" for refusal in done.refused]
    if report is not None:
        with atomic_write(report) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="backslashreplace")
    if as_json:
        counts = {"imported": done.n_imported, "known": done.n_known}
        print_json({**counts, "refused": lines, "method": done.method, "notes": list(done.notes)})
        raise typer.Exit(0 if done.n_imported or done.n_known else 1)
    for line in lines[:20]:
        console.print(f"refused {line}", soft_wrap=True)
    if len(lines) > 20:
        console.print(f"... and {len(lines) - 20} more; --report FILE lists them all")
    make_console().print(
        f"{counted(done.n_imported, 'crystal')} imported under {done.method}, {done.n_known} known already, {len(lines)} refused",
    )
    if not done.n_imported and not done.n_known:
        raise typer.Exit(1)


def check_report(report: Path, source: Path) -> None:
    """Refuse a report that could not be written or would replace what is imported, before the hours of work."""
    if report.is_dir():
        raise InvalidInput(f"--report {report}: is a folder")
    require_writable(report)
    if report.resolve() == source.resolve() or source.resolve() in report.resolve().parents:
        raise InvalidInput(f"--report {report}: would stand among what is imported; name another place")


@app.command("export")
def export_command(
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="File ending in .parquet, .csv, .json, .extxyz, .cif or .vasp, or a folder for CIF files."
        ),
    ],
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Only these crystals; the beginnings of their ids are enough.")
    ] = None,
    where: Annotated[str, typer.Option("--filter", help="OPTIMADE filter; all crystals when empty.")] = "",
) -> None:
    """Write crystals to a file that other programs read, with their energies and methods; a POSCAR (.vasp) has no place for these.

    A CIF holds them as items of its own, such as _gnome_energy_per_atom, which `gnome import` reads and other programs pass over.

    gnome export stable.parquet --filter '_gnome_e_above_hull < 0.001'   |   gnome export one.cif 3f2a9
    """
    from flows.exporting import export_crystals  # noqa: PLC0415
    from gnome.database.query import find_id  # noqa: PLC0415
    from gnome.database.store import Store  # noqa: PLC0415

    with Store.open(Settings().database, read_only=True) as store:
        named = [find_id(store, each) for each in ids or ()]
        if named:
            among = " OR ".join(f'id = "{each}"' for each in dict.fromkeys(named))
            where = f"({among}) AND ({where})" if where else among
        n, methods = export_crystals(store, out, where)
    make_console().print(f"{counted(n, 'crystal')} written to {out}")
    if len(methods) > 1:
        sys.stderr.write(
            f"gnome: of {len(methods)} methods, whose energies never meet: {', '.join(methods)}; "
            f"--filter '_gnome_method = \"{methods[0]}\"' writes those of one\n"
        )
