"""Formation and decomposition energies from formulas alone, on CritExam: ours, its blocks, and GNoME's network, in one run.

    python data/prepare_training.py ../shared/data SHARDS
    python benchmarks/compositional_critexam.py SHARDS [--arms sas preln ...] [--seeds 0 1 2]

59,509 formulas of CritExam (Bartel et al. 2020) train, but for those of buckets 55-59, by which the epoch and everything else is
chosen; the 12,752 of its validation file are reported.  Arms that end in `+` learn from other formulas too, each source under its own label
scheme: the lowest formation energies in WBM and in Materials Project data, none of a formula that is chosen by or reported on.  Published,
on CritExam's test file: Roost 0.0547 and 0.0669 eV/atom, CrabNet 0.0593 and 0.0632 with F1 0.788 and AUC 0.884 (stable: at most 0).

Runs go side by side where there is a GPU, and are kept as they end: a line each in $OUT/compositional_critexam.jsonl, answers in
$OUT/compositional_answers/.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from gpu_timing import conditions, print_table
from scipy.stats import rankdata

from gnome.crystals.formula import parse_formula, split_bucket
from gnome.models.compositional import TARGETS, CompositionalSettings
from gnome.models.datasets import TRAIN_BUCKETS, VALIDATION_BUCKETS
from gnome.models.formula_graph import FormulaGraphSettings
from gnome.models.formulas import PackedFormulas
from gnome.models.recipes import FORMULA_NETWORK, FORMULA_TRAIN, NetworkSettings, untrained
from gnome.models.training import EpochRecord, Labelled, TrainSettings, fit, predict
from gnome.quantities import Quantity

OURS = replace(FORMULA_NETWORK, n_schemes=3)
TRAIN = replace(FORMULA_TRAIN, epochs=200, precision="bf16")
ARMS: dict[str, NetworkSettings] = {
    "sas": OURS,
    "sasp": replace(OURS, block="sasp"),
    "preln": replace(OURS, block="preln"),
    "parallel": replace(OURS, block="parallel"),
    "sas relu": replace(OURS, activation="relu", hidden=768),
    "sas wide": replace(OURS, width=384, hidden=768, dropout=0.2),
    "gnome e_form": FormulaGraphSettings(),
    "gnome decomposition": FormulaGraphSettings(),
}

Row = dict[str, Any]


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


def settings_of(arm: str, parts: dict[str, tuple[PackedFormulas, np.ndarray]]) -> tuple[NetworkSettings, int | None]:
    """The network's settings with scales of the training part, and the column that a network of one target learns."""
    settings = ARMS[arm.rstrip("+").strip()]
    pack, targets = parts["train"]
    own = targets[(pack.scheme == 0).numpy()]
    spread = np.abs(own - np.median(own, 0)).mean(0)
    if isinstance(settings, FormulaGraphSettings):
        column = int("decomposition" in arm)
        return replace(settings, scale=float(spread[column]), shift=float(np.median(own[:, column]))), column
    if isinstance(settings, CompositionalSettings):
        scales, shifts = (tuple(float(x) for x in values) for values in (spread, np.median(own, 0)))
        return replace(settings, scales=scales, shifts=shifts), None
    raise ValueError(f"{arm} is no network of formulas")


def run(job: tuple[str, int, TrainSettings, Path, str, bool]) -> tuple[Row, dict[str, np.ndarray]]:
    """Train once; returns what is reported, and the answers for it."""
    arm, seed, settings, folder, device, compiled = job
    torch.set_float32_matmul_precision("high")
    if device == "cuda":
        torch.set_num_threads(1)
    parts = read_parts(folder, others=arm.endswith("+"))
    shape, column = settings_of(arm, parts)

    def labelled(name: str) -> Labelled:
        pack, targets = parts[name]
        own = targets if column is None else targets[:, column]
        return Labelled(pack.to(device), torch.tensor(own, dtype=torch.float32).to(device))

    torch.manual_seed(seed)
    network = untrained(shape).to(device)
    began = time.perf_counter()

    def say(record: EpochRecord) -> None:
        if record.epoch % 10 == 0:
            spent = time.perf_counter() - began
            print(
                f"{arm}, seed {seed}: {record.epoch}: {record.train_mae:.4f} {record.validation_mae:.4f}, {spent:.0f} s",
                flush=True,
            )

    train = labelled("train")
    if arm.endswith("+"):  # as many steps
        settings = replace(settings, epochs=max(1, round(settings.epochs * 59509 / len(train.inputs))))
    history = fit(network, train, labelled("chosen by"), replace(settings, seed=seed), on_epoch=say, compile_network=compiled)
    answers = {
        name: predict(network, parts[name][0].to(device), batch_size=8192).float().cpu().numpy()
        for name in ("chosen by", "reported")
    }
    row: Row = {"arm": arm, "seed": seed, "epochs": len(history), "seconds": time.perf_counter() - began}
    row |= {
        "parameters": sum(p.numel() for p in network.parameters()),
        "n_train": len(train.inputs),
        "train": history[-1].train_mae,
    }
    for name, found in answers.items():
        row[name] = metrics(found, parts[name][1], column)
    return row, answers


def metrics(answers: np.ndarray, targets: np.ndarray, column: int | None) -> Row:
    """Errors of both energies (eV/atom), and F1 and AUC of stable-or-not by the decomposition energy and by its own answer."""
    columns = {0: answers[:, 0], 1: answers[:, 1]} if column is None else {column: answers.reshape(-1)}
    found: Row = {str(TARGETS[i]): float(np.abs(values - targets[:, i]).mean()) for i, values in columns.items()}
    stable = targets[:, 1] <= 0
    if 1 in columns:
        found |= {"f1": f1(columns[1] <= 0, stable), "auc": auc(-columns[1], stable)}
    if column is None:
        found |= {"f1 of logit": f1(answers[:, -1] > 0, stable), "auc of logit": auc(answers[:, -1], stable)}
    return found


def f1(said: np.ndarray, true: np.ndarray) -> float:
    """Harmonic mean of precision and recall."""
    return float(2 * (said & true).sum() / (said.sum() + true.sum()))


def auc(score: np.ndarray, true: np.ndarray) -> float:
    """Probability that a stable formula scores above an unstable one (Mann-Whitney)."""
    n = int(true.sum())
    return float((rankdata(score)[true].sum() - n * (n + 1) / 2) / (n * (len(true) - n)))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help=f"any of {', '.join(ARMS)}; with + at the end all data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=TRAIN.epochs)
    parser.add_argument("--learning-rate", type=float, default=TRAIN.learning_rate)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--jobs", type=int, default=16, help="runs at a time on a GPU")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = replace(TRAIN, epochs=options.epochs, learning_rate=options.learning_rate)
    print(conditions())
    out = Path(os.environ.get("OUT", "."))
    (out / "compositional_answers").mkdir(exist_ok=True)
    jobs = [(arm, seed, settings, options.shards, device, options.compile) for seed in options.seeds for arm in options.arms]
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(options.jobs, len(jobs)) if device == "cuda" else 1, mp_context=context) as pool:
        for row, answers in pool.map(run, jobs):
            rows.append(row)
            with (out / "compositional_critexam.jsonl").open("a") as file:
                file.write(
                    json.dumps(conditions() | row | {"epochs": options.epochs, "learning_rate": options.learning_rate}) + "\n"
                )
            name = f"{row['arm']}-{row['seed']}".replace(" ", "_").replace("+", "_all")
            kept = {part.replace(" ", "_"): values.astype(np.float16) for part, values in answers.items()}
            np.savez_compressed(out / "compositional_answers" / name, **kept)
    print_rows(rows)


if __name__ == "__main__":
    main()
