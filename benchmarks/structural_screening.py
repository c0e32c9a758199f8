"""Screening in looks beside the full filter of all members at 20 volumes: speed, and how much of its choice is kept, in one run.

    python benchmarks/screening_candidates.py SHARDS/structures.parquet HULL CANDIDATES
    python benchmarks/structural_screening.py CANDIDATES [--ensemble FILE.safetensors] [--n 1000] [--budgets 0.005 0.01]

The choice is what a round spends its budget on: the structures of lowest predicted decomposition energy, one a composition, as many as
--budgets say of all candidates; the full filter is timed once.  Of its choice, what the looks let through is `kept`, and what is chosen
among that in the end is `chosen`: in BF16 and FP8 answers change with the batch, so that candidates near the last place change places.
Goals: 99 % kept; on 2 cores 100 candidates a second and 50 times the full filter, on one H200 50,000 and 2,000 for the full filter.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gpu_timing import conditions, print_table, write_row
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.shards import read_shard
from gnome.models.ensemble import StructuralEnsemble
from pipelines.cascade import LOOKS, THIRD_LOOK, Look, best_of_compositions, looking, passed_looks
from pipelines.screening import DEFAULT_SCREENING, predict_energies

FULL_FILTER = replace(THIRD_LOOK, volumes=DEFAULT_SCREENING)
DESIGNS: dict[str, tuple[Look, ...]] = {
    "three looks": LOOKS,
    "three looks, twice as many kept": tuple(replace(look, kept=2 * look.kept) for look in LOOKS),
    "two looks": LOOKS[:2],
    "one look": LOOKS[:1],
    "three looks, medians": tuple(replace(look, over_members="median") for look in LOOKS),
    "three looks, a quarter of the distance": tuple(replace(look, within=look.within / 4) for look in LOOKS),
}


class Candidates:
    """Crystals, the hull's energies at their compositions, and how often a network was asked."""

    def __init__(self, ensemble: StructuralEnsemble, crystals: list[Crystal], hull: NDArray[np.float64]) -> None:
        self.ensemble, self.crystals, self.hull = ensemble, crystals, hull
        self.evaluations = 0

    def __call__(self, rows: Sequence[int], look: Look) -> NDArray[np.float64]:
        self.evaluations += len(rows) * min(look.members, len(self.ensemble.members)) * look.volumes.n_scales
        found = predict_energies(looking(self.ensemble, look), [self.crystals[i] for i in rows], look.volumes)
        return found.e_form_per_atom - self.hull[list(rows)]


def choose(candidates: Candidates, names: list[str], budget: int, looks: tuple[Look, ...]) -> tuple[set[int], set[int]]:
    """Give the full filter to what passes the looks; returns places of these, and of the best compositions' best structures."""
    passed = passed_looks(candidates, names, budget, looks=looks)
    found = candidates(passed, FULL_FILTER)
    return set(passed), {passed[i] for i in best_of_compositions(found, [names[i] for i in passed], budget)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", type=Path)
    parser.add_argument("--ensemble", type=Path, default=Path("data/ensembles/structural.safetensors"))
    parser.add_argument("--n", type=int, default=None)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.005, 0.01], help="parts of the candidates")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp8"])
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(conditions(), f"{torch.get_num_threads()} threads")
    ensemble = StructuralEnsemble.load(options.ensemble, device, options.precision)
    if options.compile:
        for member in ensemble.members:
            member.compile(dynamic=True)
    crystals, columns, _ = read_shard(options.candidates)
    rows = [i for i, crystal in enumerate(crystals) if set(crystal.composition) <= ensemble.elements]
    rows = np.random.default_rng(0).permutation(rows)[: options.n].tolist()
    names = [columns["reduced_formula"][i] for i in rows]
    candidates = Candidates(ensemble, [crystals[i] for i in rows], np.array(columns["hull_energy"])[rows])
    candidates(range(min(64, len(rows))), FULL_FILTER)  # warms up
    table: list[tuple[str | float, ...]] = []

    def tell(name: str, budget: float, seconds: float, kept: float, chosen: float) -> None:
        rate = len(rows) / seconds
        each, evaluations = candidates.evaluations / len(rows), candidates.evaluations / seconds
        table.append((name, budget, f"{rate:,.1f}", f"{each:.1f}", f"{evaluations:,.0f}", kept, chosen))
        found = {"candidates_per_second": rate, "kept": kept, "chosen": chosen}
        write_row("structural_screening", arm=name, budget=budget, device=device, precision=options.precision, **found)
        print(table[-1], flush=True)

    candidates.evaluations, began = 0, time.perf_counter()
    full = candidates(range(len(rows)), FULL_FILTER)
    tell("full filter", 1.0, time.perf_counter() - began, 1.0, 1.0)
    for part in options.budgets:
        budget = max(1, round(part * len(rows)))
        wanted = set(best_of_compositions(full, names, budget))
        for name, looks in DESIGNS.items():
            candidates.evaluations, began = 0, time.perf_counter()
            passed, chosen = choose(candidates, names, budget, looks)
            seconds = time.perf_counter() - began
            tell(name, part, seconds, *(len(found & wanted) / len(wanted) for found in (passed, chosen)))
    print(f"{len(rows):,} candidates, {len(ensemble.members)} members")
    print_table(("", "budget", "candidates a second", "evaluations each", "evaluations a second", "kept", "chosen"), table)


if __name__ == "__main__":
    main()
