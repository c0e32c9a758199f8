"""Commands that run the loop: discover, and campaign run | schedule | status | resume."""

from typing import Annotated, Any

import typer
from rich.console import Console

from flows.cli import app, make_console, print_json
from flows.plurals import counted
from flows.settings import AUTOMATIC, SCREENED_PER_EVALUATION, CampaignSettings, RoundSettings, Settings, parse_elements
from gnome.errors import InvalidInput

campaign_app = typer.Typer(help="Run several rounds with learning in between, at once or on a schedule.", no_args_is_help=True)
app.add_typer(campaign_app, name="campaign")

_DEFAULTS = RoundSettings()

Elements = Annotated[str | None, typer.Option(help="Only these elements: Li-Fe-O or Li,Fe,O; all when not given.")]
Generator = Annotated[str, typer.Option(help="structural, compositional or both.")]
EvaluatorName = Annotated[str, typer.Option(help="chgnet, emt, gpaw, recorded:FILE ... ; GNOME_EVALUATOR when not given.")]
Budget = Annotated[int, typer.Option(help="Evaluations in a round.")]
Candidates = Annotated[int, typer.Option(help="Candidates to propose; with both pipelines, half of them structural.")]
Screened = Annotated[
    int | None,
    typer.Option(help=f"Compositions that get the full filter; {SCREENED_PER_EVALUATION} for each evaluation when not given."),
]
Order = Annotated[str, typer.Option(help="What is evaluated first: stability (surest) or greedy (deepest below the hull).")]
Unbalanced = Annotated[bool, typer.Option("--unbalanced", help="Let substitutions through that unbalance charges, marked so.")]
MaxAtoms = Annotated[int, typer.Option(help="Most atoms in a candidate's cell.")]
Formulas = Annotated[int, typer.Option(help="Formulas that the compositional pipeline searches.")]
Seed = Annotated[int, typer.Option(help="The same seed on an empty database gives the same result.")]
Rounds = Annotated[int, typer.Option(help="Rounds to run.")]
RetrainAfter = Annotated[int, typer.Option(help="New converged evaluations after which the ensemble learns.")]
Precision = Annotated[str, typer.Option(help="Of learning: fp32, bf16, fp8, or auto, on a GPU that of the ensemble in use.")]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


def _round_settings(
    settings: Settings, elements: str | None, generator: str, evaluator: str, budget: int, candidates: int,
    screened: int | None, acquisition: str, formulas: int, seed: int, unbalanced: bool, max_atoms: int,
) -> RoundSettings:  # fmt: skip
    return RoundSettings(
        elements=() if elements is None else parse_elements(elements),
        generator=generator,
        evaluator=evaluator or settings.evaluator,
        budget=budget,
        n_candidates=candidates,
        n_screened=screened,  # type: ignore[arg-type] # in proportion to the budget when None
        acquisition=acquisition,
        n_formulas=formulas,
        seed=seed,
        charge_balanced=not unbalanced,
        max_atoms=max_atoms,
    )


@app.command()
def discover(
    elements: Elements = None,
    generator: Generator = _DEFAULTS.generator,
    evaluator: EvaluatorName = "",
    budget: Budget = _DEFAULTS.budget,
    candidates: Candidates = _DEFAULTS.n_candidates,
    screened: Screened = None,
    acquisition: Order = _DEFAULTS.acquisition,
    formulas: Formulas = _DEFAULTS.n_formulas,
    seed: Seed = 0,
    unbalanced: Unbalanced = False,
    max_atoms: MaxAtoms = _DEFAULTS.max_atoms,
    as_json: Json = False,
) -> None:
    """Run one round: propose crystals, filter them, relax the best, and keep what is new.

    gnome discover --elements Li-Fe-O --budget 50
    """
    settings = Settings()
    wanted = _round_settings(
        settings, elements, generator, evaluator, budget, candidates, screened, acquisition, formulas, seed, unbalanced, max_atoms
    )
    from flows.progress import Bars  # noqa: PLC0415
    from flows.stages import run_round  # noqa: PLC0415
    from flows.workspace import open_workspace  # noqa: PLC0415

    with open_workspace(settings, evaluator=wanted.evaluator, listener=Bars(make_console(stderr=True)), resume=True) as workspace:
        record = run_round(workspace, wanted)
        report_round(workspace.store, record, make_console(), as_json=as_json)


def report_round(store: Any, record: Any, console: Console, *, as_json: bool) -> None:
    """Print what a round found, and before it what that is worth."""
    from flows.finds import finds  # noqa: PLC0415
    from flows.reports import FIND_CAPTION, find_tables, headline, round_lines, stage_table  # noqa: PLC0415

    rows = finds(store, record)
    n_known = store.count_crystals(str(record.settings["method"]), before_round=record.number)
    if as_json:
        print_json(
            {
                "round": record.number,
                "headline": headline(record, rows, n_known=n_known),
                "summary": record.summary,
                "discoveries": rows,
                "database": store.location,
            }
        )
        return
    for line in headline(record, rows, n_known=n_known):
        console.print(line, soft_wrap=True)
    for table in find_tables(rows, width=console.width):
        console.print()
        console.print(table)
    if rows:
        console.print(FIND_CAPTION, soft_wrap=True)
    console.print()
    console.print(stage_table(record.summary))
    console.print()
    for line in round_lines(record):
        console.print(line, soft_wrap=True)
    console.print(f"Database: {store.location}", soft_wrap=True)
    example = rows[0]["id"] if rows else "ID"
    console.print("Next:")
    for command in (
        f"gnome query '_gnome_round = {record.number}' --sort decomposition_energy",
        """gnome query 'elements HAS "O" AND _gnome_e_above_hull < 0.05' --format json""",
        f"gnome show {example} --lineage",
        "gnome campaign run --rounds 3",
    ):
        console.print(f"  {command}", soft_wrap=True)


@campaign_app.command("run")
def campaign_run(
    rounds: Rounds = 3,
    elements: Elements = None,
    generator: Generator = _DEFAULTS.generator,
    evaluator: EvaluatorName = "",
    budget: Budget = _DEFAULTS.budget,
    candidates: Candidates = _DEFAULTS.n_candidates,
    screened: Screened = None,
    acquisition: Order = _DEFAULTS.acquisition,
    formulas: Formulas = _DEFAULTS.n_formulas,
    seed: Seed = 0,
    unbalanced: Unbalanced = False,
    max_atoms: MaxAtoms = _DEFAULTS.max_atoms,
    retrain_after: RetrainAfter = 80,
    precision: Precision = AUTOMATIC,
    plain: Annotated[bool, typer.Option("--plain", help="Without Prefect: no runs to look at, the same result.")] = False,
    as_json: Json = False,
) -> None:
    """Run rounds one after the other, learning in between.

    gnome campaign run --rounds 3 --budget 50
    """
    settings = Settings()
    wanted = _round_settings(
        settings, elements, generator, evaluator, budget, candidates, screened, acquisition, formulas, seed, unbalanced, max_atoms
    )
    limits = CampaignSettings(rounds=rounds, retrain_after=retrain_after, precision=precision)
    _campaign(limits, wanted, settings, plain=plain, as_json=as_json, resume=False)


@campaign_app.command("resume")
def campaign_resume(
    plain: Annotated[bool, typer.Option("--plain", help="Without Prefect.")] = False,
    as_json: Json = False,
) -> None:
    """Go on with the campaign that was interrupted, with the settings it began with.

    gnome campaign resume
    """
    _campaign(CampaignSettings(), RoundSettings(), Settings(), plain=plain, as_json=as_json, resume=True)


@campaign_app.command("abandon")
def campaign_abandon() -> None:
    """Give up the round that is unfinished; what it answered stays, and the next command starts a new round.

    gnome campaign abandon
    """
    from flows.progress import Bars  # noqa: PLC0415
    from flows.stages import abandon_round  # noqa: PLC0415
    from flows.workspace import open_workspace  # noqa: PLC0415

    settings = Settings()
    _require_database(settings)
    with open_workspace(settings, listener=Bars(make_console(stderr=True)), resume=True, quiet=True) as workspace:
        record = abandon_round(workspace)
    n = (record.summary or {}).get("n_kept", 0)
    make_console().print(
        f"Round {record.number} is given up; {counted(n, 'new crystal')} of it {'is' if n == 1 else 'are'} kept."
    )


def _campaign(
    limits: CampaignSettings, wanted: RoundSettings, settings: Settings, *, plain: bool, as_json: bool, resume: bool
) -> None:
    from flows.loop import latest_round, resume_campaign, run_campaign  # noqa: PLC0415
    from flows.progress import Bars  # noqa: PLC0415
    from flows.workspace import open_workspace  # noqa: PLC0415

    if resume:
        _require_database(settings)
    asked = None if resume else wanted.evaluator
    with open_workspace(settings, evaluator=asked, listener=Bars(make_console(stderr=True)), resume=True) as workspace:
        _ = workspace.evaluator  # what cannot be opened or made is said before Prefect starts
        if resume:
            latest_round(workspace)
        if plain and resume:
            resume_campaign(workspace)
        elif plain:
            run_campaign(workspace, wanted, limits)
    if not plain:
        from flows.campaign import run_here  # noqa: PLC0415

        run_here(settings, wanted, limits, resume=resume)
    _print_status(settings, make_console(), as_json=as_json)


def _require_database(settings: Settings) -> None:
    """Raise InvalidInput where no database is: what goes on with a round makes none."""
    from gnome.database.engine import database_exists, sqlite_path  # noqa: PLC0415

    if not database_exists(settings.database):
        raise InvalidInput(
            f"database {sqlite_path(settings.database)}: there is none, so it has no round; start with `gnome campaign run`"
        )


@campaign_app.command("status")
def campaign_status(as_json: Json = False) -> None:
    """Show every round: evaluations, hit rate, and the error of the ensemble.

    gnome campaign status --json
    """
    _print_status(Settings(), make_console(), as_json=as_json)


def _print_status(settings: Settings, console: Console, *, as_json: bool) -> None:
    from flows.reports import campaign_rows, campaign_table  # noqa: PLC0415
    from gnome.database.leases import unfinished_line  # noqa: PLC0415
    from gnome.database.store import Store  # noqa: PLC0415

    with Store.open(settings.database, read_only=True) as store:
        rows = campaign_rows(store)
        location = store.location
        unfinished = store.open_round()
        now = "" if unfinished is None else unfinished_line(store, unfinished.number)
    if as_json:
        print_json(rows)
        return
    console.print(campaign_table(rows))
    if now:
        console.print(f"{now[0].upper()}{now[1:]}.", soft_wrap=True)
    console.print(f"Database: {location}", soft_wrap=True)


@campaign_app.command("schedule")
def campaign_schedule(
    cron: Annotated[str, typer.Option(help="When to run, as in crontab: '0 3 * * *' is every night at three.")],
    rounds: Rounds = 1,
    elements: Elements = None,
    generator: Generator = _DEFAULTS.generator,
    evaluator: EvaluatorName = "",
    budget: Budget = _DEFAULTS.budget,
    candidates: Candidates = _DEFAULTS.n_candidates,
    screened: Screened = None,
    acquisition: Order = _DEFAULTS.acquisition,
    formulas: Formulas = _DEFAULTS.n_formulas,
    seed: Seed = 0,
    unbalanced: Unbalanced = False,
    max_atoms: MaxAtoms = _DEFAULTS.max_atoms,
    retrain_after: RetrainAfter = 80,
    precision: Precision = AUTOMATIC,
    name: Annotated[str, typer.Option(help="Name of the deployment in Prefect.")] = "campaign",
) -> None:
    """Serve a Prefect deployment that runs a campaign whenever the schedule says so; Ctrl-C ends it.

    gnome campaign schedule --cron '0 3 * * *'
    """
    from flows.deployments import serve_campaign  # noqa: PLC0415
    from flows.progress import Bars  # noqa: PLC0415

    settings = Settings()
    wanted = _round_settings(
        settings, elements, generator, evaluator, budget, candidates, screened, acquisition, formulas, seed, unbalanced, max_atoms
    )
    limits = CampaignSettings(rounds=rounds, retrain_after=retrain_after, precision=precision)
    serve_campaign(settings, wanted, limits, cron=cron, name=name, listener=Bars(make_console(stderr=True)))
