"""How the error of the structural network falls with the number of crystals it learns from, all runs side by side on the GPUs there are.

    python data/prepare_training.py ../shared/data SHARDS
    python benchmarks/structural_scaling.py SHARDS/structures.parquet [--structure angular epochs=20] [--others NAME=FILE ...]

The same runs as `gnome train structural --scaling-law`: trained on crystals of at most four elements in buckets 0-54, reported on those of
60-69, and on those with more elements.  Further shards of crystals with e_form_per_atom, such as random structures, are reported
under the names that --others gives.  $OUT/structural_scaling.json is what `flows.scaling_law.draw` draws.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from gpu_timing import conditions
from structural_ablation import packed_arrays
from training_runs import Prepared, Row, train_jobs

from gnome.crystals.shards import read_shard
from gnome.graphs.crystal_graph import PackedGraphs
from gnome.models.recipes import STRUCTURE_RECIPES, EnsembleSettings, varied
from gnome.models.scaling import PowerLaw, ScalingExamples, ScalingSettings, reported_errors, scaling_run, scaling_split
from gnome.models.training import EpochRecord
from gnome.quantities import Quantity


@dataclass(frozen=True)
class Job:
    """One run."""

    n: int
    seed: int
    structure: tuple[str, ...]
    scaling: ScalingSettings
    folder: Path


def write_examples(path: Path, others: dict[str, Path], folder: Path, cutoff: float) -> tuple[int, dict[str, int]]:
    """Build all graphs once; returns the number of training crystals and those of each reported set."""
    crystals, columns, _ = read_shard(path)
    formulas, targets = list(columns[Quantity.REDUCED_FORMULA]), list(columns[Quantity.E_FORM_PER_ATOM])
    train, validation, reported = scaling_split(formulas)
    for name, other in others.items():
        more, own, _ = read_shard(other)
        reported[name] = np.arange(len(crystals), len(crystals) + len(more))
        crystals, targets = crystals + more, targets + list(own[Quantity.E_FORM_PER_ATOM])
    rows = {"train": train, "validation": validation, **{f"reported {name}": own for name, own in reported.items()}}
    np.savez(folder / "rows.npz", targets=np.array(targets), **rows)
    torch.save(packed_arrays(crystals, cutoff), folder / "graphs.pt")
    return len(train), {name: len(own) for name, own in reported.items()}


@lru_cache
def read_examples(folder: Path, device: str) -> ScalingExamples:
    arrays = dict(np.load(folder / "rows.npz"))
    pack = PackedGraphs(**torch.load(folder / "graphs.pt", map_location=device, weights_only=True))
    reported = {name.removeprefix("reported "): rows for name, rows in arrays.items() if name.startswith("reported ")}
    return ScalingExamples(pack, arrays["targets"], arrays["train"], arrays["validation"], reported)


def prepare(job: Job, device: str) -> Prepared:
    """Make the run, and the function that makes a row of what it gives."""
    examples = read_examples(job.folder, device)
    name, *changes = job.structure
    shape, plan = STRUCTURE_RECIPES[name]
    network, train = varied(shape, replace(plan, precision="bf16"), changes)
    own = examples.targets[examples.train]
    settings = EnsembleSettings(network=replace(network, scale=float(own.std()), shift=float(own.mean())), train=train)
    run = scaling_run(settings, job.scaling, examples, job.n, job.seed, device)

    def row(history: list[EpochRecord]) -> Row:
        errors = reported_errors(run.network, examples, device)
        return {"n_train": job.n, "seed": job.seed, "epochs": len(history), "errors": errors, "settings": asdict(settings)}

    return Prepared(f"{job.n} crystals, seed {job.seed}", run, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("structures", type=Path)
    parser.add_argument("--structure", nargs="+", default=["angular"], metavar="WORD", help="network, and changes of settings")
    parser.add_argument("--others", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--smallest", type=int, default=1000)
    parser.add_argument("--sizes", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--least-steps", type=int, default=2000)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processes", type=int, default=3, help="on each GPU")
    options = parser.parse_args()
    print(conditions())
    scaling = ScalingSettings(
        smallest=options.smallest, sizes=options.sizes, seeds=options.seeds, least_steps=options.least_steps
    )
    out = Path(os.environ.get("OUT", "."))
    others = {name: Path(file) for name, file in (pair.split("=", 1) for pair in options.others)}
    with tempfile.TemporaryDirectory() as folder:
        shape, _ = varied(*STRUCTURE_RECIPES[options.structure[0]], options.structure[1:])
        n, n_reported = write_examples(options.structures, others, Path(folder), shape.cutoff)
        jobs = [
            Job(size, seed, tuple(options.structure), scaling, Path(folder))
            for size in reversed(scaling.training_sizes(n))  # the longest first
            for seed in range(scaling.seeds)
        ]
        rows = []
        for row in train_jobs(prepare, jobs, alone=lambda _: False, compiled=options.compile, processes=options.processes):
            rows.append(row)
            sizes = [one["n_train"] for one in rows]
            enough = len(set(sizes)) > 2
            laws = {name: vars(PowerLaw.fit(sizes, [one["errors"][name] for one in rows])) for name in n_reported if enough}
            result = {**conditions(), "laws": laws, "n_reported": n_reported, "points": rows}
            (out / "structural_scaling.json").write_text(json.dumps(result, indent=1))
    for name, law in laws.items():
        print(f"{name}: exponent {law['exponent']:.3f} [{law['low']:.3f}, {law['high']:.3f}]")


if __name__ == "__main__":
    main()
