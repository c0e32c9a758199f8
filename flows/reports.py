"""What people see of a round, a campaign and a crystal: rows first, tables of them second.

Nothing here needs a model, an evaluator or Prefect, so queries stay quick.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from rich.table import Table

from gnome.database.query import query
from gnome.database.records import Ancestor, RoundRecord
from gnome.database.store import Store
from gnome.quantities import Quantity

HULL_NOTE = (
    "'stable' is said against the phases in this database and under this method alone. The shipped seeds are about a thousand, so many "
    "'new' crystals are known ones that the seeds lack; import what is known in their systems before you believe a discovery"
)


def discoveries(store: Store, number: int, *, limit: int | None = None) -> list[dict[str, Any]]:
    """New crystals of a round, those nearest to the hull first and among them the deepest; parents by formula."""
    sort = f"{Quantity.E_ABOVE_HULL},{Quantity.DECOMPOSITION_ENERGY}"
    rows = query(store, f"_gnome_round = {number}", sort=sort, limit=limit)
    parents = store.crystals_by_id({row[Quantity.PARENT] for row in rows if row[Quantity.PARENT]})
    for row in rows:
        found = parents.get(row[Quantity.PARENT] or "")
        row["parent_formula"] = found[0].row[Quantity.REDUCED_FORMULA] if found else ""
    return rows


def products(row: Mapping[str, Any]) -> str:
    """Spell what a crystal competes with, for example `0.67 Li2O + 0.33 FeO`."""
    shares = row.get(Quantity.DECOMPOSES_TO) or ()
    return " + ".join(f"{share['fraction']:.2f} {share['reduced_formula']}" for share in shares)


_WIDE: Final = 130
"""Characters that all columns of the table of discoveries need."""


def discovery_table(rows: Sequence[Mapping[str, Any]], title: str, *, width: int = _WIDE) -> Table:
    """One line a crystal; a narrow terminal gets the columns that say most."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "id": lambda row: str(row[Quantity.ID]),
        "formula": lambda row: str(row[Quantity.REDUCED_FORMULA]),
        "prototype": lambda row: str(row[Quantity.PROTOSTRUCTURE] or "").split(":", 1)[0],
        "space group": lambda row: str(row[Quantity.SPACE_GROUP_NUMBER] or ""),
        "e_form": lambda row: _number(row[Quantity.E_FORM_PER_ATOM]),
        "above hull": lambda row: _number(row[Quantity.E_ABOVE_HULL]),
        "against others": lambda row: _number(row[Quantity.DECOMPOSITION_ENERGY]),
        "parent": lambda row: str(row.get("parent_formula") or row.get(Quantity.PARENT) or ""),
        "decomposes against": products,
    }
    if width < _WIDE:
        columns = {name: cell for name, cell in columns.items() if name not in {"prototype", "space group", "parent"}}
    numbers = {"space group", "e_form", "above hull", "against others"}
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold", no_wrap=name in {"id", "formula"})
    table.caption = (
        "eV/atom; above hull: e_above_hull after the round; against others: decomposition_energy, below 0 when it lies so far below "
        "what all other compositions make (its e_form, where these are only the elements)"
    )
    table.caption_justify = "left"
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
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


def round_lines(record: RoundRecord) -> list[str]:
    """The round in a few sentences."""
    summary = record.summary or {}
    n = summary["n_evaluated"]
    failures = ", ".join(f"{count} {reason}" for reason, count in summary["failures"].items())
    rate = "no evaluation" if summary["hit_rate"] is None else f"{summary['hit_rate']:.0%}"
    lines = [
        (
            f"Round {record.number}: {summary['n_candidates']} candidates proposed, {summary['n_screened']} given the full filter, "
            f"{n} evaluated."
        ),
        f"Hit rate {rate}: {summary['n_hits']} of {n} evaluations converged to a new crystal within 1 meV/atom of the hull "
        f"before the round, or below it ({summary['n_converged']} converged, {summary['n_novel']} of them new"
        + (f"; failures: {failures})." if failures else ").")
        + f" On the hull after the round lie {summary['n_stable']} of them.",
    ]
    if summary["prediction_mae"] is not None:
        lines.append(f"The filter was off by {summary['prediction_mae']:.3f} eV/atom on average for what was evaluated.")
    if summary["offset_note"]:
        lines.append(f"Filter: {summary['offset_note']}.")
    return [*lines, f"Mind: {HULL_NOTE}."]


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
    note = "errors in eV/atom: of the filter on what the round evaluated, and of its model on the fixed validation set"
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
            "" if row["n_hits"] is None else str(row["n_hits"]),
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


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
