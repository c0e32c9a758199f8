"""Stable or not, from cells that nobody relaxed: an ensemble's answers for rows of WBM beside those of published models.

    python data/prepare_training.py ../shared/data SHARDS
    python benchmarks/structural_stability.py SHARDS/structures.parquet ../shared/data/wbm/wbm.csv.gz [--rows 2000]

A row is said to be stable when its predicted formation energy is at most the hull's there, which is e_form_per_atom less
e_above_hull_reconstructed.  Volumes: as the cell is, and GNoME's 20 between 80 and 120 %, neighbours kept or found anew at each; over them
the lowest or the mean counts.  Published models relax, or read, the same cells; rows they give no answer for, or one more than 5 eV/atom
off, count as unstable and are left out of the error.  Goals on the test part: error <= 0.022 eV/atom, F1 >= 0.87, DAF >= 5, expected
calibration error <= 0.03; what is chosen between ways, and the probability --above which rows count as stable, is chosen by the validation
part.  $OUT/structural_stability.npz keeps the answers; --picture draws how reliable the probabilities are.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from gpu_timing import conditions, print_table, write_row
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.shards import read_shard
from gnome.models.calibration import coverage, expected_calibration_error
from gnome.models.datasets import split_by_formula
from gnome.models.ensemble import StructuralEnsemble, median_and_spread
from gnome.models.metrics import best_threshold, bootstrap, f1, mean_absolute_error
from gnome.quantities import Quantity
from pipelines.screening import DEFAULT_SCREENING

Array = NDArray[np.float64]
HULL = "e_above_hull_reconstructed"
GROSS = 5.0
"""eV/atom: errors beyond which the leaderboard leaves a prediction out."""


@dataclass(frozen=True)
class Truth:
    """Formation energies of the rows and of the hull at their compositions, eV/atom."""

    energies: Array
    hull: Array

    @property
    def stable(self) -> NDArray[np.bool_]:
        """Rows on or below the hull."""
        return self.energies <= self.hull

    def row(self, name: str, predicted: Array, said: NDArray[np.bool_] | None = None) -> tuple[str | float, ...]:
        """Error and what is `said` of stability, by the energies unless given, with intervals of 95 % for error and F1."""
        given = np.isfinite(predicted) & (np.abs(predicted - self.energies) <= GROSS)
        said = given & (predicted <= self.hull) if said is None else said
        error = bootstrap(mean_absolute_error, predicted[given], self.energies[given], n_resamples=300)
        score = bootstrap(lambda a, b: f1(a > 0, b > 0), said.astype(float), self.stable.astype(float), n_resamples=300)
        hits = int((said & self.stable).sum())
        precision, recall = hits / max(int(said.sum()), 1), hits / max(int(self.stable.sum()), 1)
        daf = precision / self.stable.mean()
        write_row("structural_stability", model=name, mae=error.value, f1=score.value, daf=float(daf), n=int(given.sum()))
        return name, str(error), f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]", precision, recall, float(daf)


def read_rows(structures: Path, table: Path, part: str, n: int | None) -> tuple[list[Crystal], Truth, pd.DataFrame]:
    """Read WBM's rows of a part: crystals, truth, and the table's other columns."""
    crystals, columns, _ = read_shard(structures)
    rows = getattr(split_by_formula(columns[Quantity.REDUCED_FORMULA]), part)
    rows = rows[(np.array(columns["source"]) == "wbm")[rows]]
    known = pd.read_csv(table, keep_default_na=False, na_values=[""]).set_index("material_id")
    rows = np.random.default_rng(0).permutation(rows)[:n] if n else rows
    own = known.loc[[columns["material_id"][i] for i in rows]]
    energies = np.array(columns[Quantity.E_FORM_PER_ATOM])[rows]
    return [crystals[i] for i in rows], Truth(energies, energies - own[HULL].to_numpy()), own


def answers(ensemble: StructuralEnsemble, crystals: Sequence[Crystal], scales: Sequence[float], *, anew: bool) -> Array:
    """Energies (members, volumes, crystals), with neighbours kept, or found anew at each volume."""
    parts = []
    for start in range(0, len(crystals), 2048):
        piece = crystals[start : start + 2048]
        if anew:
            found = [ensemble.member_energies([one.scaled(scale) for one in piece]) for scale in scales]
            parts.append(np.concatenate(found, axis=1))
        else:
            parts.append(ensemble.member_energies(piece, scales))
    return np.concatenate(parts, axis=2)


def draw(probabilities: Array, stable: NDArray[np.bool_], path: Path) -> None:
    """Draw how often rows of a predicted probability are stable, and how many rows have it."""
    from matplotlib import pyplot as plt

    place = np.minimum((probabilities * 10).astype(int), 9)
    n = np.bincount(place, minlength=10)
    said = np.bincount(place, probabilities, 10) / np.maximum(n, 1)
    seen = np.bincount(place, stable.astype(float), 10) / np.maximum(n, 1)
    deviation = 1.96 * np.sqrt(seen * (1 - seen) / np.maximum(n, 1))
    figure, (axis, counts) = plt.subplots(2, 1, figsize=(4.6, 5.6), sharex=True, height_ratios=(3, 1))
    axis.plot([0, 1], [0, 1], color="#999", linewidth=0.8)
    axis.errorbar(said[n > 0], seen[n > 0], deviation[n > 0], fmt="o-", color="#4c3a8c", markersize=4, capsize=2)
    axis.set_ylabel("part of them that is stable")
    counts.bar((np.arange(10) + 0.5) / 10, n, width=0.09, color="#4c3a8c")
    counts.set_yscale("log")
    counts.set_ylabel("rows")
    counts.set_xlabel("predicted probability of stability")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("structures", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--ensemble", type=Path, default=Path("data/ensembles/structural.safetensors"))
    parser.add_argument("--part", default="test", choices=["validation", "test"])
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--volumes", type=int, default=DEFAULT_SCREENING.n_scales, help="1 leaves the other volumes out")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp8"])
    parser.add_argument(
        "--above", type=float, default=None, help="probability that counts as stable; of the validation part the best for F1"
    )
    parser.add_argument("--picture", type=Path, default=None)
    options = parser.parse_args()
    if options.part == "test" and options.above is None:
        parser.error("the test part chooses nothing: give --above, which --part validation finds")
    torch.set_float32_matmul_precision("high")
    print(conditions())
    ensemble = StructuralEnsemble.load(options.ensemble, "cuda" if torch.cuda.is_available() else "cpu", options.precision)
    crystals, truth, table = read_rows(options.structures, options.table, options.part, options.rows)
    began = time.perf_counter()
    found = answers(ensemble, crystals, [1.0], anew=False)[:, 0]
    medians, spreads = median_and_spread(found)
    rows = [truth.row("one member", found[0]), truth.row(f"{len(found)} members", medians)]
    probabilities = None
    if ensemble.calibration is not None:
        probabilities = ensemble.calibration.probability_below(truth.hull - medians, spreads)
        above = best_threshold(probabilities, truth.stable) if options.above is None else options.above
        rows.append(truth.row(f"{len(found)} members, stable above a probability of {above:.2f}", medians, probabilities > above))
    scales = np.linspace(DEFAULT_SCREENING.smallest_scale, DEFAULT_SCREENING.largest_scale, options.volumes).tolist()
    for words, anew in (("kept", False), ("found anew", True)) if options.volumes > 1 else ():
        at_volumes = answers(ensemble, crystals, scales, anew=anew)
        rows += [
            truth.row(
                f"{len(found)} members, {len(scales)} volumes, neighbours {words}, lowest",
                np.median(at_volumes, axis=0).min(axis=0),
            ),
            truth.row(
                f"{len(found)} members, {len(scales)} volumes, neighbours {words}, mean",
                np.median(at_volumes.mean(axis=1), axis=0),
            ),
        ]
    print(f"{len(crystals):,} rows, {truth.stable.mean():.4f} of them stable, {time.perf_counter() - began:.0f} s")
    for column in sorted(name for name in table.columns if name.startswith("pred_")):
        rows.append(truth.row(column.removeprefix("pred_"), table[column].to_numpy(dtype=float)))
    print_table(("", "error, eV/atom", "F1", "precision", "recall", "DAF"), rows)
    kept: dict[str, Array] = {"energies": found, "truth": truth.energies, "hull": truth.hull}
    if probabilities is not None:
        error = expected_calibration_error(probabilities, truth.stable)
        kept["p_stable"] = probabilities
        write_row("structural_stability", model="p_stable", calibration_error=error)
        print(f"expected calibration error of p_stable {error:.4f}")
        errors, levels = truth.energies - medians, (0.5, 0.68, 0.9, 0.95)
        inside = [coverage(errors, ensemble.calibration.half_widths(spreads, level)) for level in levels]
        print("within the intervals of 50, 68, 90, 95 %:", ", ".join(f"{part:.1%}" for part in inside))
        if options.picture is not None:
            draw(probabilities, truth.stable, options.picture)
    if "OUT" in os.environ:
        np.savez_compressed(Path(os.environ["OUT"]) / "structural_stability.npz", **kept)


if __name__ == "__main__":
    main()
