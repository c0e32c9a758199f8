"""Commands around models and evaluators: train, predict, evaluate, doctor."""

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli import app, make_console, print_json
from flows.settings import Settings
from gnome.errors import InvalidInput
from gnome.quantities import STABLE_TOLERANCE, Quantity

if TYPE_CHECKING:
    from flows.training import TrainRequest

HULL_COLUMNS = (
    Quantity.DECOMPOSITION_ENERGY,
    Quantity.E_ABOVE_HULL,
    Quantity.P_STABLE,
    Quantity.N_COMPETING,
    Quantity.SUPPORTED,
)
"""What is printed of a predicted crystal that a hull judges."""
OWN_COLUMNS = (Quantity.NOTE, Quantity.REFUSED)
SMALLEST = 1000
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON: a list in the order of the input.")]


@app.command("predict")
def predict_command(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="CIF, POSCAR, extxyz, JSON, CSV, Parquet, .gz of them, folders; see --formula."),
    ],
    formula: Annotated[
        bool, typer.Option("--formula", help="The arguments are formulas, or files of them (.txt, .csv, .parquet).")
    ] = False,
    model: Annotated[Path | None, typer.Option(help="Weights (.safetensors) to use instead of the ensemble in use.")] = None,
    volumes: Annotated[
        int, typer.Option(help="Volumes tried between 80 and 120 %, their mean counts; 1 takes the cell as it is.")
    ] = 1,
    method: Annotated[
        str, typer.Option(help="With --formula: predict under this method of the ensemble's labels, such as pbe-mp2020.")
    ] = "",
    hull: Annotated[
        Path | None,
        typer.Option(
            help="Judge stability by these phases: a .csv or .parquet with formula and e_form_per_atom of the model's method."
        ),
    ] = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Answer in CSV, in the order of the input.")] = False,
) -> None:
    """Predict formation energies of crystals, or of formulas alone, and whether they are stable.

    gnome predict POSCAR my_cifs/ --json

    gnome predict --formula LiFePO4 Fe2O3 my_formulas.csv
    """
    if as_json and as_csv:
        raise InvalidInput("--json and --csv: choose one")
    if formula:
        from flows.predicting_formulas import ENERGIES, predict_formulas  # noqa: PLC0415

        columns: tuple[tuple[str, ...], tuple[str, ...]] = ("formula", *ENERGIES, *OWN_COLUMNS), (Quantity.NO_P_STABLE,)
        if volumes != 1:
            raise InvalidInput(f"--volumes {volumes}: a formula has no volume; leave it out with --formula")
        if hull is not None:
            raise InvalidInput(f"--hull {hull}: for crystals only; leave it out with --formula")
        rows = predict_formulas(Settings(), files, model=model, method=method)
        if not rows:
            make_console(stderr=True).print(f"{', '.join(files)}: no formulas")
    else:
        if method:
            raise InvalidInput(f"--method {method}: with --formula only; for crystals, --model names other weights")
        from flows.predicting import predict_files  # noqa: PLC0415
        from flows.progress import Bars  # noqa: PLC0415

        energies = (Quantity.E_FORM_PER_ATOM, Quantity.SPREAD, *HULL_COLUMNS)
        columns = (
            (Quantity.REDUCED_FORMULA, *energies, *OWN_COLUMNS),
            (Quantity.ID, Quantity.E_FORM_UNCERTAINTY, Quantity.NO_P_STABLE, "hull"),
        )
        given, listener = [Path(file) for file in files], Bars(make_console(stderr=True))
        rows = predict_files(Settings(), given, model=model, volumes=volumes, hull=hull, listener=listener)
    _print_predictions(rows, as_json=as_json, as_csv=as_csv, columns=columns)
    if not (as_json or as_csv):
        _print_what_stable_means(rows)
    _fail_where_all_are_refused(rows)


def _fail_where_all_are_refused(rows: list[dict[str, Any]]) -> None:
    """End with 1, so that a script does not take it for an answer."""
    if all(row[Quantity.REFUSED] for row in rows):
        raise typer.Exit(1)


def _print_predictions(
    rows: list[dict[str, Any]], *, as_json: bool, as_csv: bool, columns: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    """Print rows; `columns` of a table, and those that a CSV has beside them."""
    names, more = columns
    if as_json:
        print_json(rows)
    elif as_csv:
        _write_csv(rows, ("input", *names, *more, Quantity.METHOD, "model"))
    else:
        _print_rows(rows, names)


@app.command("evaluate")
def evaluate_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="CIF, POSCAR, extxyz, JSON, CSV, Parquet, or folders.")],
    evaluator: Annotated[str, typer.Option(help="chgnet, emt, gpaw, recorded:FILE ...")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Write the relaxed crystals here (.extxyz, .json, .parquet or a folder).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Relax crystals with an evaluator; nothing is written to the database.

    gnome evaluate POSCAR --evaluator chgnet --out relaxed.extxyz
    """
    from flows.predicting import evaluate_files  # noqa: PLC0415
    from flows.progress import Bars  # noqa: PLC0415

    settings = Settings()
    rows = evaluate_files(
        settings, files, evaluator=evaluator or settings.evaluator, out=out, listener=Bars(make_console(stderr=True))
    )
    if as_json:
        print_json(rows)
    else:
        shown = (Quantity.ID, Quantity.REDUCED_FORMULA, Quantity.ENERGY_PER_ATOM, Quantity.E_FORM_PER_ATOM, Quantity.REFUSED)
        _print_rows(rows, shown)
    _fail_where_all_are_refused(rows)


def _print_what_stable_means(rows: list[dict[str, Any]]) -> None:
    console = make_console()
    for hull in sorted({str(row["hull"]) for row in rows if row.get("hull")}):
        if said := _verdict(hull, [row for row in rows if row.get("hull") == hull]):
            console.print(said)
        console.print("p_stable: of lying on or below the hull of known phases; a phase that is on it itself has about 0.5")
    answered = [row for row in rows if not row[Quantity.REFUSED]]
    if reasons := {str(row[Quantity.NO_P_STABLE]) for row in answered if row[Quantity.NO_P_STABLE]}:
        console.print(f"no p_stable where {'; or '.join(sorted(reasons))}")


def _verdict(hull: str, rows: list[dict[str, Any]]) -> str:
    """Count predicted compounds on a hull or below; what competes with elements alone is not called stable.

    Empty where there are none but elements.
    """
    compounds = [row for row in rows if row[Quantity.SUPPORTED] is not None]
    on_hull = [row for row in compounds if row[Quantity.E_ABOVE_HULL] <= STABLE_TOLERANCE]
    alone = [row for row in on_hull if not row[Quantity.SUPPORTED]]
    said = f"{len(on_hull)} of {len(compounds)} predicted stable against the known phases under {hull}"
    if not alone:
        return said if compounds else ""
    return (
        f"{len(on_hull)} of {len(compounds)} predicted on or below the hull of known phases under {hull}; of these {len(alone)} compete "
        f"with elements alone (supported: no), which says little: import the known compounds of their systems. "
        f"{len(on_hull) - len(alone)} predicted stable"
    )


def _write_csv(rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    writer = csv.DictWriter(sys.stdout, [str(name) for name in names], restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({str(name): value for name, value in row.items() if value is not None} for row in rows)


def _print_rows(rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """Print the columns that any row has something in."""
    from rich.table import Table  # noqa: PLC0415

    table = Table(header_style="bold", box=None, pad_edge=False)
    shown = ["input", *(name for name in names if any(row.get(name) is not None for row in rows))]
    for name in shown:
        table.add_column(str(name), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in shown))
    console = make_console()
    console.print(table)
    methods = sorted({str(row[Quantity.METHOD]) for row in rows if row.get(Quantity.METHOD)})
    console.print(f"energies in eV/atom under {', '.join(methods) or 'no method'}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


@app.command("train")
def train_command(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="structural or compositional.")],
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Crystals with energies: CSV with cif or structure, JSON entries, extxyz, Parquet, folders; compositional: tables of "
            "formulas too.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the weights go; the card is written beside them.")] = Path(
        "ensemble.safetensors"
    ),
    method: Annotated[str, typer.Option(help="Label of the method behind the energies; needed.")] = "",
    network: Annotated[
        str | None, typer.Option(help="Of a structural ensemble: angular, also when not given, or gnome, GNoME's.")
    ] = None,
    members: Annotated[int | None, typer.Option(help="Networks in the ensemble; 5 when not given, with --fine-tune all.")] = None,
    width: Annotated[
        int | None, typer.Option(help="Features of nodes and edges (256 when not given), or of elements (128).")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data; 130 when not given, 60 of formulas, 10 to fine-tune.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples in a step; 512 when not given, 256 of formulas, 16 to fine-tune.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At the start; it falls linearly to zero. By network when not given.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp8.")] = "fp32",
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    energy_key: Annotated[
        str, typer.Option(help="Field of total energies, eV a cell (an atom where it ends in per_atom), under an unusual name.")
    ] = "",
    fine_tune: Annotated[
        bool,
        typer.Option("--fine-tune", help="Teach the shipped structural ensemble a few dozen crystals or more of another method."),
    ] = False,
    start: Annotated[
        Path | None, typer.Option("--from", help="With --fine-tune: weights (.safetensors) to begin with instead.")
    ] = None,
    scaling_law: Annotated[
        bool,
        typer.Option("--scaling-law", help="Measure instead how the error of one network falls with the number of crystals."),
    ] = False,
    smallest: Annotated[
        int | None,
        typer.Option(
            help=f"With --scaling-law: the smallest of six training sets, {SMALLEST} unless given; three runs each, of 2,000 steps or more."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train an ensemble; a run that was interrupted goes on when the same command is given again.

    Examples are split by the hash of their formulas. Formation energies are taken from total ones by the elements' own entries.

    gnome train structural shards/*.parquet --out my.safetensors --method my-pbe

    gnome train structural my.csv entries.json --out my.safetensors --method my-pbe --fine-tune

    On several GPUs, which share the members: torchrun --nproc-per-node 8 -m flows.cli train ...
    """
    from flows.progress import Bars  # noqa: PLC0415
    from flows.training import TrainRequest, defaults_for, train_files  # noqa: PLC0415

    if fine_tune:
        unwanted = {"--network": network, "--width": width, "--scaling-law": scaling_law or None, "--smallest": smallest}
        if given := [name for name, value in unwanted.items() if value is not None]:
            raise InvalidInput(f"{', '.join(given)}: leave out with --fine-tune, which takes the networks as they are")
        _fine_tune(
            kind, tuple(files), out, method, start=start, energy_key=energy_key, members=members, epochs=epochs,
            batch_size=batch_size, learning_rate=learning_rate, precision=precision, seed=seed, as_json=as_json,
        )  # fmt: skip
        return
    if start is not None:
        raise InvalidInput(f"--from {start}: goes with --fine-tune")
    if kind == "compositional" and network is not None:
        raise InvalidInput(f"--network {network}: goes with structural ensembles")
    network = network or "angular"
    shape, usual = defaults_for(kind, network)
    request = TrainRequest(
        kind=kind, network=network, files=tuple(files), out=out, method=method, members=5 if members is None else members,
        width=shape.width if width is None else width,
        epochs=usual.epochs if epochs is None else epochs,
        batch_size=usual.batch_size if batch_size is None else batch_size,
        learning_rate=usual.learning_rate if learning_rate is None else learning_rate,
        precision=precision, seed=seed, energy_key=energy_key,
    )  # fmt: skip
    if scaling_law:
        _scaling_law(request, SMALLEST if smallest is None else smallest, as_json=as_json)
        return
    if smallest is not None:
        raise InvalidInput(f"--smallest {smallest}: goes with --scaling-law")
    card = train_files(request, Bars(make_console(stderr=as_json)))
    if card is None:  # another process of the run says it
        return
    if as_json:
        print_json(card)
        return
    _print_metrics(card)
    make_console().print(f"Weights: {out}")


def _print_metrics(card: dict[str, Any]) -> None:
    for name, metrics in card["metrics"].items():
        mae, rank = metrics["mae"], metrics["spearman"]
        make_console().print(
            f"{name}: n {metrics['n']}, MAE {mae['value']:.4f} [{mae['low']:.4f}, {mae['high']:.4f}] eV/atom, "
            f"rank correlation {rank['value']:.3f} [{rank['low']:.3f}, {rank['high']:.3f}]",
        )


def _fine_tune(
    kind: str, files: tuple[Path, ...], out: Path, method: str, *, start: Path | None, energy_key: str, members: int | None,
    precision: str, as_json: bool, **training: Any,
) -> None:  # fmt: skip
    from dataclasses import replace  # noqa: PLC0415

    from flows.fine_tuning import GENTLE, FineTuneRequest, fine_tune  # noqa: PLC0415
    from flows.progress import Bars  # noqa: PLC0415
    from flows.training import check_precision  # noqa: PLC0415

    if kind != "structural":
        raise InvalidInput(f"--fine-tune: for structural ensembles, not {kind} ones")
    given = {name: value for name, value in training.items() if value is not None}
    if not 0 <= given["seed"] < 2**63:
        raise InvalidInput(f"seed is {given['seed']}, expected 0 or more")
    train = replace(GENTLE, **given, precision=check_precision(precision))
    request = FineTuneRequest(
        files=files, out=out, method=method, start=start, energy_key=energy_key, members=members, train=train
    )
    card = fine_tune(request, Bars(make_console(stderr=as_json)))
    if as_json:
        print_json(card)
        return
    change, console = card["difference"], make_console()
    console.print("On crystals that the networks which answer had not learnt:")
    _print_metrics(card)
    verdict = "better than before" if card["improved"] else "not measured to be better: the interval holds 0; give more crystals"
    console.print(
        f"change of the error: {change['value']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}] eV/atom, {verdict}",
        soft_wrap=True,
    )
    console.print(f"{card['trained_on']}; it answers for {len(card['elements'])} elements under {card['method']}", soft_wrap=True)
    console.print(f"Weights: {out}")


def _scaling_law(request: "TrainRequest", smallest: int, *, as_json: bool) -> None:
    from flows.progress import Bars  # noqa: PLC0415
    from flows.scaling_law import measure_scaling_law, scaling_file  # noqa: PLC0415
    from gnome.models.scaling import ScalingSettings  # noqa: PLC0415

    law = measure_scaling_law(request, ScalingSettings(smallest=smallest), Bars(make_console(stderr=as_json)))
    if as_json:
        print_json(law)
        return
    console = make_console()
    for name, own in law["laws"].items():
        console.print(
            f"{name}: error ~ n^-{own['exponent']:.3f} [{own['low']:.3f}, {own['high']:.3f}] on {law['n_reported'][name]} crystals"
        )
    console.print(f"Errors: {scaling_file(request.out, 'json')}, picture: {scaling_file(request.out, 'svg')}")


@app.command("doctor")
def doctor_command(
    settings: Annotated[
        bool, typer.Option("--settings", help="Print a gnome.toml with every setting, commented, and check nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
) -> None:
    """Check the installation: versions, device, database, ensembles, evaluators; each OK or what to do.

    gnome doctor   |   gnome doctor --settings > gnome.toml
    """
    if settings:
        from flows.settings_example import example_toml  # noqa: PLC0415

        sys.stdout.write(example_toml())
        return
    from flows.doctor import examine  # noqa: PLC0415

    findings = examine(Settings())
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        console = make_console()
        for finding in findings:
            advice = f"; {finding.advice}" if finding.advice else ""
            console.print("OK  " if finding.ok else "fix ", style="green" if finding.ok else "red", end=" ")
            console.print(f"{finding.name:<24} {finding.found}{advice}", soft_wrap=True)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)
