"""What people see of a round, a campaign and a crystal: rows first, tables of them second.

Nothing here needs a model, an evaluator or Prefect, so queries stay quick.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.table import Table

from flows.plurals import counted
from gnome.database.records import Ancestor, RoundRecord
from gnome.database.store import Store
from gnome.quantities import Quantity

HULL_NOTE = (
    "Stable means: against the crystals of this method in this database. Many finds are known compounds that the shipped seeds lack; "
    "import the known phases of a system before you believe a discovery in it."
)
FORMULA_NOTE = "The formula check has learnt two thirds of the Materials Project's compositions: of those it is partly memory."


def products(row: Mapping[str, Any]) -> str:
    """Spell what a crystal competes with, for example `0.67 Li2O + 0.33 FeO`."""
    shares = row.get(Quantity.DECOMPOSES_TO) or ()
    return " + ".join(f"{share['fraction']:.2f} {share['reduced_formula']}" for share in shares)


_WIDE: Final = 140
"""Characters that all columns of the table of finds need."""

_TITLES: Final = {
    "hit": "Hits: on the hull, with known compounds to compete against",
    "near the hull": "Near the hull (within 50 meV/atom of it)",
    "doubtful": "Doubtful: on or near the hull, but something speaks against it",
}


def find_tables(rows: Sequence[Mapping[str, Any]], *, width: int = _WIDE, most: int = 25) -> Iterator[Table]:
    """Yield a table for each group of finds that there is; the headline counts those far above the hull."""
    for group, title in _TITLES.items():
        of_group = [row for row in rows if row["group"] == group]
        if of_group:
            shown = of_group[:most]
            number = f"{len(shown)} of {len(of_group)}" if len(shown) < len(of_group) else str(len(of_group))
            yield find_table(shown, f"{title} ({number})", width=width)


@dataclass(frozen=True)
class _Column:
    name: str
    cell: Callable[[Mapping[str, Any]], str]
    is_number: bool = False
    is_essential: bool = False


_COLUMNS: Final = (
    _Column("id", lambda row: str(row[Quantity.ID]), is_essential=True),
    _Column("formula", lambda row: str(row[Quantity.REDUCED_FORMULA]), is_essential=True),
    _Column("known in", lambda row: ", ".join(row["known_in"]) or "-"),
    _Column("space group", lambda row: str(row[Quantity.SPACE_GROUP_NUMBER] or ""), is_number=True),
    _Column("above hull", lambda row: _number(row[Quantity.E_ABOVE_HULL]), is_number=True, is_essential=True),
    _Column("against others", lambda row: _number(row[Quantity.DECOMPOSITION_ENERGY]), is_number=True),
    _Column("compete", lambda row: str(row["n_competing_before"] or 0), is_number=True, is_essential=True),
    _Column("p stable", lambda row: _share(row[Quantity.P_STABLE]), is_number=True, is_essential=True),
    _Column("formula p", lambda row: _share(row[Quantity.FORMULA_CHECK]), is_number=True, is_essential=True),
    _Column("parent", lambda row: str(row["parent_formula"] or row[Quantity.PARENT] or "")),
    _Column("decomposes against", products),
)
_DOUBTS: Final = _Column("what speaks against it", lambda row: "; ".join(row["doubts"]), is_essential=True)
FIND_CAPTION: Final = (
    "eV/atom. above hull: after the round; against others: below 0 when it lies so far below what all other compositions make; "
    "compete: compounds of its system known before, within 0.1 eV/atom of the hull; p stable: the structural ensemble's probability; "
    "formula p: that of its formula alone; known in: methods under which this database had the composition before"
)


def find_table(rows: Sequence[Mapping[str, Any]], title: str, *, width: int = _WIDE) -> Table:
    """One line a crystal; a narrow terminal gets the columns that say most."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    columns = [*_COLUMNS, *([_DOUBTS] if any(row["doubts"] for row in rows) else [])]
    shown = [column for column in columns if column.is_essential or width >= _WIDE]
    for column in shown:
        fixed = column.name in {"id", "formula"}
        table.add_column(column.name, justify="right" if column.is_number else "left", overflow="fold", no_wrap=fixed)
    for row in rows:
        table.add_row(*(column.cell(row) for column in shown))
    return table


def stage_table(summary: Mapping[str, Any]) -> Table:
    """Seconds by stage."""
    table = Table(title="Cost of each stage", title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, seconds in summary["seconds"].items():
        table.add_row(stage, f"{seconds:.1f}")
    table.add_row("all", f"{sum(summary['seconds'].values()):.1f}")
    return table


def headline(record: RoundRecord, rows: Sequence[Mapping[str, Any]], *, n_known: int) -> list[str]:
    """What to know before reading the table of finds: how many hits, against what they were judged, and what that is worth.

    `n_known`: crystals under the round's method before it.
    """
    summary = record.summary or {}
    found = {row[Quantity.REDUCED_FORMULA] for row in rows}
    expected = [(formula, p) for formula, p in record.settings.get("expected") or () if formula not in found]
    hint = [expected_line(record.settings.get("elements", ()), expected)] if expected else []
    if summary.get("emptied_by"):
        return [f"Round {record.number} evaluated nothing. {summary['emptied_by']}.", *hint]
    n, hits = summary.get("n_evaluated", 0), [row for row in rows if row["is_hit"]]
    rate = "no evaluation" if summary.get("hit_rate") is None else f"{summary['hit_rate']:.0%}"
    doubtful = sum(bool(row["doubts"]) for row in hits)
    known = sum(bool(row["known_in"]) for row in hits)
    alone = sum(not row[Quantity.SUPPORTED.value] for row in rows)
    far = sum(row["group"] == "other" for row in rows)
    remarks = [
        (doubtful, f"Doubtful, and shown last: {counted(doubtful, 'hit')}."),
        (known, f"With a composition that this database knows under another method: {counted(known, 'hit')}."),
        (alone, f"Not called stable, because they compete with the elements alone: {counted(alone, 'find')}."),
        (far, f"More than 50 meV/atom above the hull, and not shown: {counted(far, 'find')}."),
    ]
    return [
        (
            f"Round {record.number}: {counted(len(hits), 'hit')} in {counted(n, 'evaluation')} ({rate}): new compositions on the hull, "
            f"judged by {record.settings.get('method')} against the {counted(n_known, 'crystal')} here and the round's own finds."
        ),
        HULL_NOTE,
        *hint,
        *(words for count, words in remarks if count),
    ]


def expected_line(symbols: Iterable[str], expected: Sequence[tuple[str, float]], *, shown: int = 8) -> str:
    """Say which compounds a system is expected to have beside those that are known, and what follows from that."""
    first = ", ".join(f"{formula} ({p:.2f})" for formula, p in expected[:shown])
    number = counted(len(expected), "compound")
    return (
        f"{number} of {'-'.join(sorted(symbols))} that this database lacks {'is' if len(expected) == 1 else 'are'} expected to be stable "
        f"by formula alone: {first}{' ...' if len(expected) > shown else ''}. Many will be known: import what is known there first, with "
        "`gnome import`."
    )


def round_lines(record: RoundRecord) -> list[str]:
    """The round in a few sentences."""
    summary = record.summary or {}
    if "n_evaluated" not in summary:
        return [f"Round {record.number} was given up: {summary.get('not_assessed', 'nothing is known of it')}."]
    n = summary["n_evaluated"]
    failures = ", ".join(f"{count} {reason}" for reason, count in summary["failures"].items())
    rate = "no evaluation" if summary["hit_rate"] is None else f"{summary['hit_rate']:.0%}"
    lines = [
        (
            f"Round {record.number}: {summary['n_candidates']} candidates proposed, {summary['n_screened']} given the full filter, "
            f"{n} evaluated ({summary['n_converged']} converged, {summary['n_novel']} of them new"
            + (f"; failures: {failures})." if failures else ").")
        ),
        (
            f"Hit rate {rate}: {summary['n_hits']} of {n} evaluations gave a new composition that competes with a known compound and lies "
            "within 1 meV/atom of the hull that holds the round's finds."
        ),
    ]
    if summary.get("emptied_by"):
        lines.append(f"Nothing was evaluated. {summary['emptied_by']}.")
    if summary["prediction_mae"] is not None:
        lines.append(f"The filter was off by {summary['prediction_mae']:.3f} eV/atom on average for what was evaluated.")
    if summary["offset_note"]:
        lines.append(f"Filter: {summary['offset_note']}.")
    return [*lines, FORMULA_NOTE]


def campaign_rows(store: Store) -> list[dict[str, Any]]:
    """One row a round: what it evaluated, its hit rate, the errors of its ensemble, and what was learnt after it.

    Errors eV/atom: `error_evaluated` of the filter on what the round evaluated, `error_validation` of its ensemble on the fixed validation
    set, known once a retraining has measured it.
    """
    models = {model.round: model for model in store.model_history("structural") if model.round is not None}
    on_validation: dict[str | None, float] = {}
    for _, model in sorted(models.items()):  # a model may have several children; the first measured it on the hull it served
        on_validation.setdefault(model.parent_id, model.metrics["validation_mae_before"])
    on_validation |= {model.id: model.metrics["validation_mae"]["value"] for model in models.values()}
    rows = []
    for record in store.rounds():
        summary = record.summary or {}
        learnt = models.get(record.number)
        rows.append(
            {
                "round": record.number,
                "state": record.state,
                "n_candidates": summary.get("n_candidates"),
                "n_evaluated": summary.get("n_evaluated"),
                "n_hits": summary.get("n_hits"),
                "hits_alone": "n_hits" in summary and "hits" not in summary,  # counted before hits had to compete with a compound
                "hit_rate": summary.get("hit_rate"),
                "model": record.settings.get("model"),
                "error_evaluated": summary.get("prediction_mae"),
                "error_validation": on_validation.get(record.settings.get("model")),
                "error_before": learnt.metrics.get("validation_mae_before") if learnt else None,
                "error_after": learnt.metrics["validation_mae"]["value"] if learnt else None,
                "retrained": learnt.id if learnt else None,
                "promoted": learnt.status == "promoted" or _succeeded(models.values(), learnt.id) if learnt else None,
            }
        )
    return rows


def campaign_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Hit rate and model error by round."""
    rows = list(rows)
    note = "errors in eV/atom: of the filter on what the round evaluated, and of its model on the fixed validation set"
    if any(row["hits_alone"] for row in rows):
        note += "; * counted by an older version, hits against the elements alone included"
    table = Table(
        title="Rounds", caption=note, title_justify="left", caption_justify="left", header_style="bold", box=None, pad_edge=False
    )
    for name in (
        "round",
        "state",
        "candidates",
        "evaluated",
        "hits",
        "hit rate",
        "model",
        "error",
        "on validation",
        "learnt after it",
    ):
        table.add_column(name, justify="left" if name in {"state", "model", "learnt after it"} else "right")
    for row in rows:
        verdict = "" if row["retrained"] is None else f"{row['retrained']} {'promoted' if row['promoted'] else 'not promoted'}"
        if verdict:
            verdict += f", {_number(row['error_before'])} -> {_number(row['error_after'])}"
        table.add_row(
            str(row["round"]),
            row["state"],
            str(row["n_candidates"] or ""),
            str(row["n_evaluated"] or ""),
            "" if row["n_hits"] is None else f"{row['n_hits']}{'*' if row['hits_alone'] else ''}",
            "" if row["hit_rate"] is None else f"{row['hit_rate']:.0%}",
            str(row["model"] or ""),
            _number(row["error_evaluated"]),
            _number(row["error_validation"]),
            verdict,
        )
    return table


def lineage_rows(chain: Sequence[Ancestor]) -> list[dict[str, Any]]:
    """One row a step from a crystal down to the seed it came from."""
    rows = []
    for step in chain:
        row = step.crystal.row
        found: dict[str, Any] = {
            name: row[name]
            for name in (
                Quantity.ID,
                Quantity.REDUCED_FORMULA,
                Quantity.ORIGIN,
                Quantity.ROUND,
                Quantity.E_FORM_PER_ATOM,
                "source",
            )
        }
        if step.candidate is not None:
            found["made_by"] = {
                "candidate": step.candidate.id,
                Quantity.GENERATOR: step.candidate.generator,
                Quantity.PARENT: step.candidate.parent_id,
                "parameters": dict(step.candidate.parameters),
                "seed": step.candidate.seed,
            }
            found["predictions"] = [dict(vars(prediction)) for prediction in step.predictions]
            found["evaluations"] = [
                {
                    "method": record.method.label,
                    "converged": record.converged,
                    "n_steps": record.n_steps,
                    "cost_seconds": record.cost_seconds,
                }
                for record in step.evaluations
            ]
        rows.append(found)
    return rows


def _succeeded(models: Iterable[Any], model_id: str) -> bool:
    """Say whether a later model was made from this one, so that it was in use once."""
    return any(model.parent_id == model_id for model in models)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
