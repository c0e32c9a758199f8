"""Matbench's mp_e_form by formula: the lowest formation energy of each, five folds by hash; ours beside a CrabNet-like and GNoME's network.

    python data/prepare_training.py ../shared/data SHARDS
    python benchmarks/compositional_matbench.py SHARDS [--folds 0 1 2 3 4] [--arms ours crabnet gnome]

Fold k tests on the formulas whose bucket (md5 of the formula modulo 100) leaves k when divided by 5; a twentieth of all chooses the
epoch.  All arms learn from the same formulas and from nothing else.  Published for CrabNet on the full set by formula: 0.0774 eV/atom; here
are CritExam's test formulas left out, so that only the arms compare.
"""

import argparse
import json
import os
import statistics
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from compositional_critexam import OURS, TRAIN, packed
from crabnet_like import CrabNetLike, CrabNetLikeSettings
from gpu_timing import conditions, print_table
from torch import nn
from training_runs import Prepared, Row, train_jobs

from gnome.crystals.formula import split_bucket
from gnome.models.formula_graph import FormulaGraphNetwork, FormulaGraphSettings
from gnome.models.formulas import PackedFormulas
from gnome.models.recipes import untrained
from gnome.models.training import EpochRecord, Labelled, Run, predict
from gnome.quantities import Quantity

ARMS = ("ours", "crabnet", "gnome")
RATES = {"ours": TRAIN.learning_rate, "crabnet": 3e-4, "gnome": 1e-3}
DECAYS = {"ours": TRAIN.weight_decay, "crabnet": 1e-2, "gnome": 1e-2}
OLDER_SCHEME = 1


@dataclass(frozen=True)
class Job:
    """One arm on one fold."""

    arm: str
    fold: int
    epochs: int
    shards: Path
    rate: float | None


def make(arm: str, centre: float, spread: float) -> nn.Module:
    if arm == "ours":
        return untrained(replace(OURS, n_schemes=1, shifts=(centre, 0.0), scales=(spread, 1.0)))
    if arm == "crabnet":
        return CrabNetLike(CrabNetLikeSettings(scale=spread, shift=centre))
    return FormulaGraphNetwork(FormulaGraphSettings(scale=spread, shift=centre))


@lru_cache
def read(shards: Path) -> tuple[PackedFormulas, np.ndarray, np.ndarray]:
    """Formulas, energies and buckets."""
    table = pq.read_table(shards / "formulas.parquet").to_pandas()
    table = table[table["scheme"] == OLDER_SCHEME]
    formulas = table[Quantity.REDUCED_FORMULA]
    bucket = formulas.map(split_bucket).to_numpy()
    return packed(formulas, np.zeros(len(table))), table[Quantity.E_FORM_PER_ATOM].to_numpy(), bucket


def prepare(job: Job, device: str) -> Prepared:
    """Make the run of an arm on a fold."""
    pack, energies, bucket = read(job.shards)
    test = bucket % 5 == job.fold
    chosen = ~test & (bucket % 20 == (job.fold + 1) % 20)
    train = ~test & ~chosen
    centre = float(np.median(energies[train]))
    spread = float(np.abs(energies[train] - centre).mean())

    def part(rows: np.ndarray) -> Labelled:
        indices = torch.from_numpy(np.flatnonzero(rows))
        targets = torch.tensor(energies[rows], dtype=torch.float32)
        if job.arm == "ours":
            targets = torch.stack([targets, torch.full_like(targets, torch.nan)], 1)
        own = PackedFormulas(pack.atomic_numbers[indices], pack.fractions[indices], pack.scheme[indices])
        return Labelled(own.to(device), targets.to(device))

    torch.manual_seed(job.fold)
    network = make(job.arm, centre, spread).to(device)
    rate, decay = job.rate or RATES[job.arm], DECAYS[job.arm]
    settings = replace(TRAIN, seed=job.fold, learning_rate=rate, weight_decay=decay, epochs=job.epochs)
    run = Run(network=network, train=part(train), validation=part(chosen), settings=settings)

    def row(history: list[EpochRecord]) -> Row:
        answers = predict(network, part(test).inputs, batch_size=8192).float().cpu().numpy()
        predicted = answers if answers.ndim == 1 else answers[:, 0]
        made: Row = {"arm": job.arm, "fold": job.fold, "epochs": len(history), "n_test": int(test.sum()), "learning_rate": rate}
        made["mae"] = float(np.abs(predicted - energies[test]).mean())
        made["chosen by"] = min(record.validation_mae for record in history)
        return made | {"parameters": sum(p.numel() for p in network.parameters())}

    return Prepared(f"{job.arm}, fold {job.fold}, {rate:g}", run, row)


def print_rows(rows: list[Row]) -> None:
    """A row for each arm, each fold at the learning rate whose error on the part that chooses is least."""
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        best: dict[int, Row] = {}
        for row in rows:
            fold = row["fold"]
            if row["arm"] == arm and (fold not in best or row["chosen by"] < best[fold]["chosen by"]):
                best[fold] = row
        errors = [row["mae"] for row in best.values()]
        spread = f"{statistics.stdev(errors):.4f}" if len(errors) > 1 else ""
        rates = ", ".join(sorted({f"{row['learning_rate']:g}" for row in best.values()}))
        parameters = f"{next(iter(best.values()))['parameters'] / 1e6:.2f}M"
        table.append((arm, parameters, rates, len(errors), f"{statistics.mean(errors):.4f}", spread))
    print_table(("network", "parameters", "learning rates", "folds", "mean absolute error, eV/atom", "sd"), table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--rates", nargs="+", type=float, help="to try for each arm instead of its own")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processes", type=int, default=2, help="on each GPU, for all networks but GNoME's, which have one each")
    options = parser.parse_args()
    print(conditions())
    out = Path(os.environ.get("OUT", ".")) / "compositional_matbench.jsonl"
    rates = options.rates or [None]
    jobs = [
        Job(arm, fold, options.epochs, options.shards, rate) for fold in options.folds for arm in options.arms for rate in rates
    ]
    rows = []
    for row in train_jobs(
        prepare, jobs, alone=lambda job: job.arm == "gnome", compiled=options.compile, processes=options.processes
    ):
        rows.append(row)
        print(f"{row['arm']}, fold {row['fold']}: {row['mae']:.4f} eV/atom, {row['seconds']:.0f} s", flush=True)
        with out.open("a") as file:
            file.write(json.dumps(conditions() | row) + "\n")
    print_rows(rows)


if __name__ == "__main__":
    main()
