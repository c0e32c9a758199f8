"""Commands around the ensembles of a database: which there are, and which is in use."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from flows.cli import app, make_console, print_json
from flows.settings import Settings

if TYPE_CHECKING:
    from gnome.database.records import ModelRecord

models_app = typer.Typer(help="Which ensembles there are, and which of them predict and filter.", no_args_is_help=True)
app.add_typer(models_app, name="models")

Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


@models_app.command("list")
def list_command(as_json: Json = False) -> None:
    """Show every ensemble: the shipped ones, those learnt in campaigns, and your own.

    gnome models list
    """
    from flows.ensembles import list_models  # noqa: PLC0415 - loads torch, as below

    settings = Settings()
    rows = list_models(settings)
    if as_json:
        print_json(rows)
        return
    console = make_console()
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in ("id", "kind", "status", "origin", "method", "members", "MAE, eV/atom", "weights"):
        table.add_column(name, overflow="fold", no_wrap=name in {"id", "kind"})
    for row in rows:
        origin = row["origin"] if row["round"] is None else f"{row['origin']}, round {row['round']}"
        method = ", ".join(dict.fromkeys(row["methods"]))
        table.add_row(row["id"], row["kind"], row["status"], origin, method, str(row["n_members"]), row["errors"], row["file"])
    console.print(table)
    for row in rows:
        console.print(f"{row['id']}: {row['path']}", soft_wrap=True)
        if row["trained_on"]:
            console.print(f"  trained on {row['trained_on']}", soft_wrap=True)
        if row["held_out"]:
            console.print(f"  held out: {row['held_out']}", soft_wrap=True)


@models_app.command("use")
def use_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Weights (.safetensors) with their card (.json) beside them.")],
    method: Annotated[
        str, typer.Option(help="The method of its energies, where this database does not know it; guards against a misspelt one.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Put an ensemble of your own in use, as `gnome train` writes it; its weights are copied into the data folder.

    gnome models use my.safetensors
    """
    from flows.ensembles import use_ensemble  # noqa: PLC0415
    from flows.workspace import open_workspace  # noqa: PLC0415

    with open_workspace(Settings()) as workspace:
        record = use_ensemble(workspace, file, method=method)
    _say(record, as_json=as_json)


@models_app.command("promote")
def promote_command(
    model: Annotated[str, typer.Argument(metavar="ID", help="Id of an ensemble of the database, or the beginning of it.")],
    as_json: Json = False,
) -> None:
    """Put an ensemble in use that the database has.

    gnome models promote 89a14a98
    """
    from flows.ensembles import promote  # noqa: PLC0415
    from flows.workspace import open_workspace  # noqa: PLC0415

    with open_workspace(Settings()) as workspace:
        record = promote(workspace, model)
    _say(record, as_json=as_json)


@models_app.command("rollback")
def rollback_command(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="structural or compositional.")] = "structural",
    as_json: Json = False,
) -> None:
    """Put the ensemble back in use that was before; given again, the one before that.

    gnome models rollback
    """
    from flows.ensembles import rollback  # noqa: PLC0415
    from flows.workspace import open_workspace  # noqa: PLC0415

    with open_workspace(Settings()) as workspace:
        record, passed = rollback(workspace, kind)
    if passed:
        make_console(stderr=True).print(f"Passed over, as their weights are gone: {', '.join(passed)}", soft_wrap=True)
    _say(record, as_json=as_json)


def _say(record: "ModelRecord", *, as_json: bool) -> None:
    if record.kind == "structural" and record.card.get("calibration") is None:
        make_console(stderr=True).print(
            "Its card has no calibration (too few crystals were held out): under its own method predictions come without p_stable",
            soft_wrap=True,
        )
    answer: dict[str, Any] = {"id": record.id, "kind": record.kind, "method": record.card.get("method"), "path": record.path}
    if as_json:
        print_json(answer)
        return
    make_console().print(
        f"In use: {record.kind} ensemble {record.id} of {answer['method']}; a round that has begun keeps the one it began with",
        soft_wrap=True,
    )
