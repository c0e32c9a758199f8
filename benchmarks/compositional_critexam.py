"""Formation and decomposition energies from formulas alone, on CritExam: ours, its blocks, and GNoME's network, in one run.

    python data/prepare_training.py ../shared/data SHARDS
    python benchmarks/compositional_critexam.py SHARDS [--arms sas preln ...] [--seeds 0 1 2]

59,509 formulas of CritExam (Bartel et al. 2020) train, but for those of buckets 55-59, by which the epoch and everything else is
chosen; the 12,752 of its validation file are reported.  Arms whose name ends in `+` learn from other formulas too, each source under its
own label scheme: the lowest formation energies in WBM and in Materials Project data, none of a formula that is chosen by or reported on.
Settings of an arm's network or training may follow its name: "sas+ learning_rate=1e-3 depth=4".  Published, on CritExam's test file:
Roost 0.0547 and 0.0669 eV/atom, CrabNet 0.0593 and 0.0632 with F1 0.788 and AUC 0.884 (stable: at most 0).

Runs go side by side where there is a GPU, and are kept as they end: a line each in $OUT/compositional_critexam.jsonl, all answers in
$OUT/compositional_answers.npz, of which, for networks of both targets, medians over seeds are reported too.
"""

import argparse
import json
import os
import statistics
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from gpu_timing import conditions, print_table
from training_runs import Prepared, Row, train_jobs

from gnome.crystals.formula import parse_formula, split_bucket
from gnome.models.compositional import TARGETS, CompositionalSettings
from gnome.models.datasets import TRAIN_BUCKETS, VALIDATION_BUCKETS
from gnome.models.formula_graph import FormulaGraphSettings
from gnome.models.formulas import PackedFormulas
from gnome.models.metrics import auc, best_threshold, f1
from gnome.models.recipes import FORMULA_NETWORK, FORMULA_TRAIN, NetworkSettings, untrained, varied
from gnome.models.training import EpochRecord, Labelled, Run, TrainSettings, predict
from gnome.quantities import Quantity

OURS = replace(FORMULA_NETWORK, n_schemes=3)
TRAIN = replace(FORMULA_TRAIN, precision="bf16")
N_TRAIN = 59509
ARMS: dict[str, NetworkSettings] = {
    "sas": OURS,
    "sasp": replace(OURS, block="sasp"),
    "preln": replace(OURS, block="preln"),
    "parallel": replace(OURS, block="parallel"),
    "gnome-e_form": FormulaGraphSettings(),
    "gnome-decomposition": FormulaGraphSettings(),
}


@dataclass(frozen=True)
class Job:
    """One run of an arm."""

    arm: str
    seed: int
    epochs: int
    shards: Path

    @property
    def name(self) -> str:
        """The arm's name without its settings."""
        return self.arm.split()[0].rstrip("+")

    @property
    def others(self) -> bool:
        """Whether it learns from other formulas too."""
        return self.arm.split()[0].endswith("+")

    @property
    def settings(self) -> tuple[NetworkSettings, TrainSettings]:
        """The network's settings and how it is trained."""
        return varied(ARMS[self.name], replace(TRAIN, seed=self.seed), self.arm.split()[1:])


@lru_cache
def read_parts(folder: Path, *, others: bool) -> dict[str, tuple[PackedFormulas, np.ndarray]]:
    """Formulas and both targets of the parts `train`, `chosen by` and `reported`."""
    table = pq.read_table(folder / "critexam.parquet").to_pandas()
    bucket = table[Quantity.REDUCED_FORMULA].map(split_bucket)
    chosen = (table["part"] == "train") & bucket.isin(VALIDATION_BUCKETS)
    parts = {
        "train": table[(table["part"] == "train") & ~chosen].assign(scheme=0),
        "chosen by": table[chosen].assign(scheme=0),
        "reported": table[table["part"] == "val"].assign(scheme=0),
    }
    if others:
        more = pq.read_table(folder / "formulas.parquet").to_pandas()
        held = set(parts["chosen by"][Quantity.REDUCED_FORMULA]) | set(parts["reported"][Quantity.REDUCED_FORMULA])
        fits = more[Quantity.REDUCED_FORMULA].map(split_bucket).isin(TRAIN_BUCKETS) & ~more[Quantity.REDUCED_FORMULA].isin(held)
        more = more[fits].assign(scheme=more["scheme"] + 1, **{Quantity.DECOMPOSITION_ENERGY: np.nan})
        joined = [part[[Quantity.REDUCED_FORMULA, "scheme", *TARGETS]] for part in (parts["train"], more)]
        parts["train"] = type(more)(
            {name: np.concatenate([part[name].to_numpy() for part in joined]) for name in joined[0].columns}
        )
    return {
        name: (packed(part[Quantity.REDUCED_FORMULA], part["scheme"]), part[list(TARGETS)].to_numpy())
        for name, part in parts.items()
    }


def packed(formulas: Any, schemes: Any) -> PackedFormulas:
    return PackedFormulas.from_compositions([parse_formula(formula) for formula in formulas], [int(x) for x in schemes])


def settings_of(job: Job, train: tuple[PackedFormulas, np.ndarray]) -> tuple[NetworkSettings, int | None]:
    """The network's settings with scales of the training part, and the column that a network of one target learns."""
    settings = job.settings[0]
    pack, targets = train
    own = targets[(pack.scheme == 0).numpy()]
    centre = np.median(own, 0)
    spread = np.abs(own - centre).mean(0)
    if isinstance(settings, FormulaGraphSettings):
        column = int("decomposition" in job.name)
        return replace(settings, n_schemes=3, scale=float(spread[column]), shift=float(centre[column])), column
    if isinstance(settings, CompositionalSettings):
        return replace(settings, scales=tuple(spread.tolist()), shifts=tuple(centre.tolist())), None
    raise ValueError(f"{job.arm} is no network of formulas")


def prepare(job: Job, device: str) -> Prepared:
    """Make the run, and the function that makes a row of what it gives."""
    parts = read_parts(job.shards, others=job.others)
    shape, column = settings_of(job, parts["train"])

    def labelled(name: str) -> Labelled:
        pack, targets = parts[name]
        own = targets if column is None else targets[:, column]
        return Labelled(pack.to(device), torch.tensor(own, dtype=torch.float32).to(device))

    torch.manual_seed(job.seed)
    network = untrained(shape).to(device)
    epochs = max(1, round(job.epochs * N_TRAIN / len(parts["train"][0])))  # as many steps
    settings = replace(job.settings[1], epochs=epochs)
    run = Run(network=network, train=labelled("train"), validation=labelled("chosen by"), settings=settings)

    def row(history: list[EpochRecord]) -> Row:
        best = min(history, key=lambda record: record.validation_mae)
        made: Row = {"arm": job.arm, "seed": job.seed, "epochs": len(history), "best epoch": best.epoch}
        made |= {"parameters": sum(p.numel() for p in network.parameters()), "n_train": len(run.train.inputs)}
        made |= {"train": history[-1].train_mae, "answers": {}}
        for name in ("chosen by", "reported"):
            answers = predict(network, parts[name][0].to(device), batch_size=8192).float().cpu().numpy()
            made["answers"][name] = answers
        return made | measured(made["answers"], parts, column)

    return Prepared(f"{job.arm}, seed {job.seed}", run, row)


def measured(answers: dict[str, np.ndarray], parts: dict[str, tuple[PackedFormulas, np.ndarray]], column: int | None) -> Row:
    """Metrics on both parts; the logit that counts as stable is the one of the best F1 on the part that chooses."""
    threshold = 0.0
    if column is None:
        logits, stable = answers["chosen by"][:, -1], parts["chosen by"][1][:, 1] <= 0
        threshold = best_threshold(logits, stable)
    return {name: metrics(answers[name], parts[name][1], column, threshold) for name in ("chosen by", "reported")}


def metrics(answers: np.ndarray, targets: np.ndarray, column: int | None, threshold: float) -> Row:
    """Errors of both energies (eV/atom), and F1 and AUC of stable-or-not by the decomposition energy and by its own answer."""
    columns = {0: answers[:, 0], 1: answers[:, 1]} if column is None else {column: answers.reshape(-1)}
    found: Row = {str(TARGETS[i]): float(np.abs(values - targets[:, i]).mean()) for i, values in columns.items()}
    stable = targets[:, 1] <= 0
    if 1 in columns:
        found |= {"f1": f1(columns[1] <= 0, stable), "auc": auc(-columns[1], stable)}
    if column is None:
        found |= {"f1 of logit": f1(answers[:, -1] > threshold, stable), "auc of logit": auc(answers[:, -1], stable)}
    return found


def print_rows(rows: list[Row]) -> None:
    for part in ("chosen by", "reported"):
        names = sorted({name for row in rows for name in row[part]})
        table = []
        for arm in dict.fromkeys(row["arm"] for row in rows):
            own = [row for row in rows if row["arm"] == arm]
            cells = []
            for name in names:
                values = [row[part][name] for row in own if name in row[part]]
                spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.4f}{spread}" if values else "")
            table.append((arm, len(own), f"{own[0]['parameters'] / 1e6:.2f}M", *cells, f"{own[0]['seconds']:.0f}"))
        print(f"\n{part}; eV/atom")
        print_table(("arm", "seeds", "parameters", *names, "seconds"), table)


def medians(rows: list[Row], shards: Path) -> list[Row]:
    """Metrics of the median over the seeds of each arm that has several."""
    found = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        if len(own) > 1 and own[0]["answers"]["reported"].ndim > 1:
            answers = {part: np.median([one["answers"][part] for one in own], 0) for part in own[0]["answers"]}
            row = own[0] | {"arm": f"{arm}, median of {len(own)}"}
            found.append(row | measured(answers, read_parts(shards, others=False), None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help=f"any of {', '.join(ARMS)}; with + all data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processes", type=int, default=1, help="on each GPU, for all networks but GNoME's, which have one each")
    options = parser.parse_args()
    print(conditions())
    out = Path(os.environ.get("OUT", "."))
    jobs = [Job(arm, seed, options.epochs, options.shards) for seed in options.seeds for arm in options.arms]
    rows = []

    def alone(job: Job) -> bool:
        return isinstance(job.settings[0], FormulaGraphSettings)

    for row in train_jobs(prepare, jobs, alone=alone, compiled=options.compile, processes=options.processes):
        rows.append(row)
        kept = {name: value for name, value in row.items() if name != "answers"}
        with (out / "compositional_critexam.jsonl").open("a") as file:
            file.write(json.dumps(conditions() | kept) + "\n")
        names = [f"{one['arm']}, {one['seed']}, {part}" for one in rows for part in one["answers"]]
        answers = [values.astype(np.float16) for one in rows for values in one["answers"].values()]
        np.savez_compressed(out / "compositional_answers.npz", **dict(zip(names, answers, strict=True)))
    print_rows(rows + medians(rows, options.shards))


if __name__ == "__main__":
    main()
