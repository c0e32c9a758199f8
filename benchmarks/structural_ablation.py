"""What makes the structural network better?  Arms of networks and of training, each with several seeds, at equal data.

    python data/prepare_training.py ../shared/data SHARDS
    python benchmarks/structural_ablation.py SHARDS/structures.parquet [--arms gnome "angular channels=0" ...] [--epochs 30] [--seeds 0 1 2]

Arms: angular, gnome, cgcnn (of PyG's layers), megnet (matgl's wheel must be on the path); settings of network or training may follow the
name.  Trains on buckets 0-54, lets 55-59 choose the epoch, and reports rows of WBM in 60-69, eV/atom; between arms choose by 55-59 alone.
Runs go side by side on the GPUs; each leaves a line in $OUT/structural_ablation.jsonl, and its answers for the reported rows in
$OUT/structural_answers.npz.
"""

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from cgcnn_like import CGCNN, CGCNNSettings
from gpu_timing import conditions, print_table
from megnet_of_matgl import MEGNetOfMatGL, MEGNetSettings
from torch import nn
from training_runs import Prepared, Row, train_jobs

from gnome.crystals.crystal import Crystal
from gnome.crystals.shards import read_shard
from gnome.graphs.crystal_graph import PackedGraphs
from gnome.models.angular_network import AngularSettings
from gnome.models.datasets import labelled_subset, split_by_formula
from gnome.models.recipes import PLAIN_TRAIN, STRUCTURE_RECIPES, untrained, varied
from gnome.models.structural import StructuralSettings
from gnome.models.training import EpochRecord, Run, TrainSettings, predict
from gnome.quantities import Quantity

Shape = StructuralSettings | AngularSettings | CGCNNSettings | MEGNetSettings
RECIPES: dict[str, tuple[Shape, TrainSettings]] = {
    **STRUCTURE_RECIPES,
    "cgcnn": (CGCNNSettings(), PLAIN_TRAIN),
    "megnet": (MEGNetSettings(), PLAIN_TRAIN),
}


@dataclass(frozen=True)
class Job:
    """One run of an arm; `folder` holds the graphs by cutoff, and the labels."""

    arm: str
    seed: int
    epochs: int
    folder: Path

    @property
    def settings(self) -> tuple[Shape, TrainSettings]:
        """The network's settings and how it is trained."""
        name, *words = self.arm.split()
        shape, train = RECIPES[name]
        return varied(shape, replace(train, precision="bf16", seed=self.seed, epochs=self.epochs), words)


def write_parts(path: Path, folder: Path, cutoffs: set[float], rows: int | None) -> None:
    """Build the graphs for each cutoff once, for all runs to read."""
    crystals, columns, _ = read_shard(path)
    crystals = crystals[:rows]
    split = split_by_formula(columns[Quantity.REDUCED_FORMULA][:rows])
    of_wbm = np.array(columns["source"][:rows]) == "wbm"
    np.savez(
        folder / "labels.npz",
        targets=np.array(columns[Quantity.E_FORM_PER_ATOM][:rows]),
        train=split.train,
        validation=split.validation,
        reported=split.test[of_wbm[split.test]],
    )
    for cutoff in sorted(cutoffs):
        torch.save(packed_arrays(crystals, cutoff), folder / f"graphs-{cutoff}.pt")


def packed_arrays(crystals: list[Crystal], cutoff: float) -> dict[str, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pack = PackedGraphs.from_crystals(crystals, cutoff, device).to("cpu")
    return {field.name: getattr(pack, field.name) for field in fields(pack)}


@lru_cache
def read_graphs(folder: Path, cutoff: float, device: str) -> PackedGraphs:
    return PackedGraphs(**torch.load(folder / f"graphs-{cutoff}.pt", map_location=device, weights_only=True))


def build(shape: Shape) -> nn.Module:
    """Make an untrained network, ours or another's."""
    if isinstance(shape, CGCNNSettings):
        return CGCNN(shape)
    return MEGNetOfMatGL(shape) if isinstance(shape, MEGNetSettings) else untrained(shape)


def prepare(job: Job, device: str) -> Prepared:
    """Make the run, and the function that makes a row of what it gives."""
    shape, train = job.settings
    labels = dict(np.load(job.folder / "labels.npz"))
    targets = labels.pop("targets")
    own = targets[labels["train"]]
    torch.manual_seed(job.seed)
    shape = replace(shape, scale=float(own.std()), shift=float(own.mean()))
    network = build(shape).to(device)
    parts = {
        name: labelled_subset(read_graphs(job.folder, shape.cutoff, device), targets, rows, device)
        for name, rows in labels.items()
    }
    run = Run(network=network, train=parts["train"], validation=parts["validation"], settings=train)

    def row(history: list[EpochRecord]) -> Row:
        answers = predict(network, parts["reported"].inputs, batch_size=2048).double().cpu().numpy()
        best = min(history, key=lambda record: record.validation_mae)
        made: Row = {"arm": job.arm, "seed": job.seed, "epochs": len(history), "best epoch": best.epoch}
        made |= {"parameters": sum(p.numel() for p in network.parameters()), "train": history[-1].train_mae}
        made |= {"validation": best.validation_mae, "reported": float(np.abs(answers - targets[labels["reported"]]).mean())}
        return made | {"answers": answers}

    return Prepared(f"{job.arm}, seed {job.seed}", run, row)


def print_rows(rows: list[Row]) -> None:
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        cells = []
        for part in ("validation", "reported", "train"):
            errors = [row[part] for row in own]
            spread = f" ± {statistics.stdev(errors):.4f}" if len(errors) > 1 else ""
            cells.append(f"{statistics.mean(errors):.4f}{spread}")
        best = statistics.mean(row["best epoch"] for row in own)
        table.append((arm, len(own), f"{own[0]['parameters'] / 1e6:.2f}M", *cells, f"{best:.0f}", f"{own[0]['seconds']:.0f}"))
    print("\nmean absolute error, eV/atom")
    print_table(("arm", "seeds", "parameters", "validation", "reported", "train", "best epoch", "seconds"), table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("structures", type=Path)
    parser.add_argument("--arms", nargs="+", default=["gnome", "angular channels=0", "angular"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rows", type=int, default=None, help="use only the first rows, for a trial")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processes", type=int, default=2, help="on each GPU")
    options = parser.parse_args()
    print(conditions())
    out = Path(os.environ.get("OUT", "."))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(arm, seed, options.epochs, Path(folder)) for seed in options.seeds for arm in options.arms]
        cutoffs = {job.settings[0].cutoff for job in jobs}
        write_parts(options.structures, Path(folder), cutoffs, options.rows)
        for row in train_jobs(prepare, jobs, alone=lambda _: False, compiled=options.compile, processes=options.processes):
            rows.append(row)
            kept = {name: value for name, value in row.items() if name != "answers"}
            with (out / "structural_ablation.jsonl").open("a") as file:
                file.write(json.dumps(conditions() | kept) + "\n")
            np.savez_compressed(
                out / "structural_answers.npz",
                **{f"{one['arm']}, {one['seed']}": one["answers"].astype(np.float32) for one in rows},
            )
    print_rows(rows)


if __name__ == "__main__":
    main()
