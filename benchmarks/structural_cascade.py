"""Stable or not after CHGNet has relaxed what an ensemble lets pass: rows of WBM's test buckets, a random part of those that pass.

    WBM=../shared/data/wbm/wbm.csv.gz
    OUT=answers python benchmarks/structural_stability.py SHARDS/structures.parquet $WBM --volumes 1
    python benchmarks/structural_cascade.py SHARDS/structures.parquet $WBM answers/structural_stability.npz [--relaxed 400]

A row passes when the ensemble's median is at most the hull.  Of these, --relaxed are relaxed, and then CHGNet's energy, or the mean of both
energies, has the last word; a relaxation that fails says unstable.  What is found is carried over to all that pass, with bootstrap
intervals over the relaxed rows.  CHGNet learnt energies with the same corrections as the hull has, so its formation energies, from its own
elements, are taken as they are; what the two methods differ in is part of its error here, as on the leaderboard.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from gpu_timing import conditions, print_table, write_row
from numpy.typing import NDArray
from structural_stability import Truth, read_rows

from dft_stub.chgnet import CHGNetEvaluator
from flows.evaluating import answers
from gnome.crystals.crystal import Crystal
from gnome.models.metrics import bootstrap

Array = NDArray[np.float64]


def relaxed_energies(crystals: list[Crystal], workers: int) -> Array:
    """Formation energies by CHGNet, eV/atom; NaN where a relaxation failed."""
    energies = np.full(len(crystals), np.nan)
    began = time.perf_counter()
    asked = {str(i): crystal for i, crystal in enumerate(crystals)}
    for n, answer in enumerate(answers(CHGNetEvaluator(workers=workers), asked), start=1):
        if answer.converged and answer.e_form_per_atom is not None:
            energies[int(answer.id)] = answer.e_form_per_atom
        if n % 50 == 0:
            print(f"{n} of {len(crystals)} relaxed, {time.perf_counter() - began:.0f} s", flush=True)
    return energies


def row(name: str, said: NDArray[np.bool_], stable: NDArray[np.bool_], truth: Truth, n_passed: int) -> tuple[str | float, ...]:
    """F1, precision, recall and DAF of a verdict on a part of the rows that pass, over all rows."""
    n_stable, weight = int(truth.stable.sum()), n_passed / len(said)

    def score(verdict: Array, is_stable: Array) -> float:
        return float(2 * weight * (verdict * is_stable).sum() / (weight * verdict.sum() + n_stable))

    found = bootstrap(score, said.astype(float), stable.astype(float))
    hits = float((said & stable).sum())
    precision, recall = hits / max(float(said.sum()), 1.0), weight * hits / n_stable
    daf = precision / float(truth.stable.mean())
    write_row("structural_cascade", verdict=name, f1=found.value, precision=precision, recall=recall, daf=daf, relaxed=len(said))
    return name, f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]", precision, recall, daf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("structures", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--relaxed", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print(conditions())
    crystals, truth, _ = read_rows(options.structures, options.table, "test", None)
    kept = np.load(options.answers)
    if not np.array_equal(kept["truth"], truth.energies):
        raise SystemExit(f"{options.answers} holds answers for other rows; make it from all rows of the test part")
    medians = np.median(kept["energies"].astype(float), axis=0)
    passed = np.flatnonzero(medians <= truth.hull)
    chosen = np.sort(np.random.default_rng(0).permutation(passed)[: options.relaxed])
    energies = relaxed_energies([crystals[i] for i in chosen], options.workers)
    stable, hull = truth.stable[chosen], truth.hull[chosen]
    rows = [
        row("the ensemble alone", np.ones(len(chosen), dtype=bool), stable, truth, len(passed)),
        row("and CHGNet", energies <= hull, stable, truth, len(passed)),
        row("and the mean of both", (energies + medians[chosen]) / 2 <= hull, stable, truth, len(passed)),
    ]
    converged = np.isfinite(energies)
    off = np.abs(energies - truth.energies[chosen])[converged].mean(), np.abs(medians[chosen] - truth.energies[chosen]).mean()
    print(f"{len(passed):,} of {len(crystals):,} rows pass, {len(chosen)} relaxed, {int(converged.sum())} converged")
    print(f"on these CHGNet is off by {off[0]:.4f} eV/atom, the ensemble by {off[1]:.4f}")
    print_table(("", "F1", "precision", "recall", "DAF"), rows)


if __name__ == "__main__":
    main()
