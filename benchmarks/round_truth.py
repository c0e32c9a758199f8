"""What a first round says, held against the Materials Project's hull.

    python benchmarks/round_truth.py --yardstick mp_hull_entries.csv.gz [--seeds 0 1 2] [--systems Li-Fe-P-O Na-Mn-O Al-Ni] [--work FOLDER]

The default round with each seed, and one round in each system with seed 0, every one on a fresh database with the shipped seeds.  Its hits
are looked up in a table of formation energies (columns `formula`, `e_form_per_atom`; eV/atom, elements at 0), which is for measuring only
and never ships.  Where a hit's composition is in the table, its lowest entry there says how far above the hull of the table it lies; where
not, the evaluator's formation energy against that hull.  `by the evaluator` uses the latter for all: CHGNet's errors are as large as
the limits.  Rounds that are finished in the work folder are read, not run again.

The yardstick has weak spots: bromides and iodides come out up to 0.1 eV/atom high, and peroxides are off.  The formula check has learnt two
thirds of the compositions that the Materials Project knows, so that `known` is partly memory.
"""

import argparse
import csv
import gzip
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.finds import finds
from flows.settings import RoundSettings, Settings, parse_elements
from flows.stages import run_round
from flows.workspace import open_workspace
from gnome.crystals.formula import parse_formula, reduced_formula
from gnome.quantities import NEAR_HULL_TOLERANCE, PLAUSIBLE_E_FORM
from gnome.stability.hull import ConvexHull, HullEntry

SPURIOUS = 0.1
"""eV/atom above the yardstick's hull: nobody calls such a crystal stable."""


@dataclass(frozen=True)
class Yardstick:
    """A hull, and the lowest formation energy of each composition on or above it, eV/atom."""

    hull: ConvexHull
    lowest: Mapping[str, float]

    def judge(self, formula: str, e_form: float) -> tuple[float | None, float]:
        """Distances above the hull of the composition's own lowest entry, None where there is none, and of an energy."""
        on_hull = self.hull.energy(parse_formula(formula))
        known = self.lowest.get(formula)
        return (None if known is None else known - on_hull), e_form - on_hull


def read_yardstick(path: Path) -> Yardstick:
    """Read a table, packed or not."""
    entries, lowest = [], {}
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for i, row in enumerate(csv.DictReader(file)):
            composition, e_form = parse_formula(row["formula"]), float(row["e_form_per_atom"])
            if PLAUSIBLE_E_FORM[0] <= e_form <= PLAUSIBLE_E_FORM[1]:
                entries.append(HullEntry(id=str(i), composition=composition, e_form_per_atom=e_form))
                formula = reduced_formula(composition)
                lowest[formula] = min(e_form, lowest.get(formula, e_form))
    return Yardstick(ConvexHull("yardstick", entries), lowest)


def play(folder: Path, seed: int, elements: Sequence[str], budget: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run one round on a fresh database, or read the one that is there; returns its summary and its hits."""
    name = "-".join(elements) or "default"
    settings = Settings(database_url=f"sqlite:///{folder / f'{name}-{seed}.db'}")
    with open_workspace(settings) as workspace:
        done = [record for record in workspace.store.rounds() if record.state == "finished"]
        record = done[0] if done else run_round(workspace, RoundSettings(seed=seed, elements=tuple(elements), budget=budget))
        return dict(record.summary or {}), [row for row in finds(workspace.store, record) if row["is_hit"]]


def count(yardstick: Yardstick, hits: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Count hits by what the yardstick says of them."""
    rows = []
    for hit in hits:
        formula = str(hit["reduced_formula"])
        own, ours = yardstick.judge(formula, float(hit["e_form_per_atom"]))
        rows.append({"formula": formula, "own": own, "by_evaluator": ours, "doubts": hit["doubts"], "p_stable": hit["p_stable"]})
    verdicts = [row["by_evaluator"] if row["own"] is None else row["own"] for row in rows]
    return {
        "hits": len(rows),
        "known": sum(row["own"] is not None for row in rows),
        "within 50 meV": sum(verdict <= NEAR_HULL_TOLERANCE for verdict in verdicts),
        "spurious": sum(verdict > SPURIOUS for verdict in verdicts),
        "within 50 meV by the evaluator": sum(row["by_evaluator"] <= NEAR_HULL_TOLERANCE for row in rows),
        "spurious by the evaluator": sum(row["by_evaluator"] > SPURIOUS for row in rows),
        "rows": rows,
    }


def line(name: str, n_evaluated: int, found: Mapping[str, Any]) -> str:
    """One row of the table, shares of the hits in brackets."""
    n = max(1, found["hits"])
    names = ("known", "within 50 meV", "spurious", "within 50 meV by the evaluator", "spurious by the evaluator")
    cells = [f"{found[key]} ({found[key] / n:.0%})" for key in names]
    return f"| {name} | {n_evaluated} | {found['hits']} | " + " | ".join(cells) + " |"


def main() -> None:
    """Run, judge, print a table, and write what was judged."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--yardstick", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="*", default=["Li-Fe-P-O", "Na-Mn-O", "Al-Ni"])
    parser.add_argument("--budget", type=int, default=60)
    parser.add_argument("--work", type=Path, default=None, help="where the databases are kept; a temporary folder when not given")
    arguments = parser.parse_args()
    folder = arguments.work or Path(tempfile.mkdtemp(prefix="round-truth-"))
    folder.mkdir(parents=True, exist_ok=True)
    yardstick = read_yardstick(arguments.yardstick)
    print(
        "| round | evaluated | hits | known | within 50 meV | spurious (> 100 meV) | within 50 meV, by the evaluator | spurious, by it |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    everything, all_hits, n_evaluated = [], [], 0
    for seed in arguments.seeds:
        summary, hits = play(folder, seed, (), arguments.budget)
        everything.append({"round": "default", "seed": seed, "summary": summary, **count(yardstick, hits)})
        print(line(f"default, seed {seed}", summary["n_evaluated"], everything[-1]), flush=True)
        all_hits += hits
        n_evaluated += summary["n_evaluated"]
    if all_hits:
        print(line("default, all seeds", n_evaluated, count(yardstick, all_hits)), flush=True)
    for system in arguments.systems:
        summary, hits = play(folder, 0, parse_elements(system), arguments.budget)
        everything.append({"round": system, "seed": 0, "summary": summary, **count(yardstick, hits)})
        print(line(system, summary["n_evaluated"], everything[-1]), flush=True)
    (folder / "round_truth.json").write_text(json.dumps(everything, indent=1) + "\n")
    print(f"\nWhat was judged: {folder / 'round_truth.json'}")


if __name__ == "__main__":
    main()
