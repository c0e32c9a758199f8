"""Does the structural network learn as well in FP8?  The same network and crystals in FP32, BF16 and FP8, several seeds of each.

    python data/prepare_training.py ../shared/data SHARDS
    python benchmarks/fp8_structural.py SHARDS/structures.parquet [--rows 60000] [--epochs 20] [--width 128] [--seeds 0 1 2]

Trains by `gnome.models.training.fit`, as `gnome train structural` does, and reports the mean absolute error on the validation buckets
(55-59), which also choose the epoch, and on the test buckets (60-69), eV/atom.  With the same seed all arms have the same initial
weights, batches and volumes.  Runs go side by side, a process each where there is a GPU.  Finished runs are kept, a line each, in
--results (by default $OUT/fp8_structural.jsonl), and not repeated.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_timing import conditions, print_table

from gnome.crystals.shards import read_shard
from gnome.graphs.crystal_graph import PackedGraphs
from gnome.models.datasets import labelled_subset, split_by_formula
from gnome.models.structural import StructuralNetwork, StructuralSettings
from gnome.models.training import TrainSettings, fit, predict
from gnome.quantities import Quantity

ARMS = ("fp32", "bf16", "fp8")
SETTINGS = ("rows", "epochs", "width", "batch_size")

Row = dict[str, Any]
Part = tuple[PackedGraphs, np.ndarray]


def read_parts(path: Path, rows: int) -> dict[str, Part]:
    """Graphs and labels of the three parts, of a random but fixed choice of rows."""
    crystals, columns, _ = read_shard(path)
    chosen = np.random.default_rng(0).permutation(len(crystals))[:rows]
    crystals = [crystals[i] for i in chosen]
    targets = np.asarray(columns[Quantity.E_FORM_PER_ATOM])[chosen]
    split = split_by_formula([columns[Quantity.REDUCED_FORMULA][i] for i in chosen])
    parts = {}
    for name in ("train", "validation", "test"):
        own = getattr(split, name)
        parts[name] = (
            PackedGraphs.from_crystals([crystals[i] for i in own], StructuralSettings().cutoff),
            targets[own],
        )
    return parts


def run(job: tuple[str, int, Row, dict[str, Part], str]) -> Row:
    """Train once."""
    arm, seed, settings, parts, device = job
    if device == "cuda":
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    train, validation, test = (
        labelled_subset(*parts[name], np.arange(len(parts[name][1])), device) for name in ("train", "validation", "test")
    )
    torch.manual_seed(seed)
    spread, mean = float(train.targets.std()), float(train.targets.mean())
    network = StructuralNetwork(StructuralSettings(width=settings["width"], scale=spread, shift=mean)).to(device)
    chosen = TrainSettings(
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        volume_jitter=0.2,
        seed=seed,
        precision=arm,
        fp8_min_features=0,
    )
    began = time.perf_counter()
    history = fit(network, train, validation, chosen)
    errors = {name: float((predict(network, own.inputs) - own.targets).abs().mean())
              for name, own in (("validation", validation), ("test", test))}  # fmt: skip
    return {
        **conditions(), "arm": arm, "seed": seed, **settings, **errors,
        "last_validation": history[-1].validation_mae, "train": history[-1].train_mae,
        "seconds": time.perf_counter() - began, "n_train": len(train.targets), "n_test": len(test.targets),
    }  # fmt: skip


def matches(row: Row, settings: Row) -> bool:
    return all(row[key] == value for key, value in settings.items())


def print_rows(rows: list[Row]) -> None:
    """Print mean and standard deviation over seeds, and the distance from BF16 in units of BF16's deviation."""
    table = []
    for arm in ARMS:
        own, base = ([row for row in rows if row["arm"] == name] for name in (arm, "bf16"))
        if not own:
            continue
        cells: list[Any] = [arm, len(own)]
        for name in ("train", "last_validation", "test"):
            values, reference = [row[name] for row in own], [row[name] for row in base]
            spread = statistics.stdev(reference) if len(reference) > 1 else float("nan")
            beside = (statistics.mean(values) - statistics.mean(reference)) / spread if reference else float("nan")
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells += [f"{statistics.mean(values):.4f} ± {deviation:.4f}", f"{beside:+.2f}" if arm != "bf16" else ""]
        table.append((*cells, f"{statistics.median(row['seconds'] for row in own):.0f}"))
    first = rows[0]
    print(
        f"\n{first['n_train']} crystals, {first['n_test']} in test, width {first['width']}, {first['epochs']} epochs; {first['gpu']}"
    )
    print("mean absolute errors in eV/atom; beside BF16's in its standard deviations")
    print_table(("arm", "seeds", "train", "beside", "validation", "beside", "test", "beside", "seconds"), table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--arms", nargs="+", default=["bf16", "fp8"], choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, help="file of finished runs, read and added to")
    options = parser.parse_args()
    if options.results is None and os.environ.get("OUT"):
        options.results = Path(os.environ["OUT"]) / "fp8_structural.jsonl"
    settings = {key: getattr(options, key) for key in SETTINGS}
    rows = (
        [json.loads(line) for line in options.results.read_text().splitlines()]
        if options.results and options.results.exists()
        else []
    )
    rows = [row for row in rows if matches(row, settings)]
    missing = [
        (arm, seed) for seed in options.seeds for arm in options.arms
        if not any(row["arm"] == arm and row["seed"] == seed for row in rows)
    ]  # fmt: skip
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    parts = read_parts(options.shard, options.rows)
    print(", ".join(f"{name}: {len(targets)}" for name, (_, targets) in parts.items()), flush=True)
    jobs = [(arm, seed, settings, parts, device) for arm, seed in missing]
    with ProcessPoolExecutor(max(1, len(jobs)) if on_gpu else 1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(run, jobs):
            rows.append(row)
            print(f"{row['arm']}, seed {row['seed']}: test {row['test']:.4f} eV/atom, {row['seconds']:.0f} s", flush=True)
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print_rows(rows)


if __name__ == "__main__":
    main()
