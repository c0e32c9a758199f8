"""Train the shipped ensembles; the cards say with which options.

    python data/prepare_training.py SOURCE SHARDS
    python data/train_ensembles.py SHARDS OUT

On GPUs the members train at the same time, those of a process together.  Where time on GPUs comes in pieces, `--only` trains some members
and leaves their weights in OUT/state; the same command without it, on any machine, trains what is missing and writes ensemble and card.
A member that was interrupted goes on where it stopped on the same kind of device.
Needs torch, torch-geometric, numpy, scipy, pandas, pyarrow and safetensors.  The split is by composition: buckets 0-54 train, 55-59 stop
and choose, 60-69 are reported.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
import torch.multiprocessing as mp
from calibration_checks import check_errors, check_stable

from gnome.atomic_write import atomic_write
from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import parse_formula
from gnome.crystals.shards import read_shard
from gnome.graphs.crystal_graph import PackedGraphs
from gnome.models.checkpoint import load_ensemble, save_ensemble
from gnome.models.compositional import TARGETS
from gnome.models.datasets import Split, labelled_subset, split_by_formula
from gnome.models.ensemble import calibrate_crystals, median_and_spread
from gnome.models.formula_ensemble import STABLE, calibrate_formulas
from gnome.models.formulas import PackedFormulas
from gnome.models.metrics import atomic_fractions, fit_linear_model, score
from gnome.models.recipes import (
    FORMULA_NETWORK,
    FORMULA_TRAIN,
    STRUCTURE_RECIPES,
    EnsembleSettings,
    train_members,
    untrained,
    varied,
)
from gnome.models.training import EpochRecord, TrainSettings, predict
from gnome.quantities import Quantity

METHOD = "pbe-mp2020"
LICENCES = [
    "WBM: CC BY 4.0 (Wang, Botti, Marques, npj Comput. Mater. 7, 12 (2021))",
    "Materials Project: CC BY 4.0 (Jain et al. 2013)",
]
FORMULA_LICENCES = [
    *LICENCES,
    "CritExam, as CrabNet distributes it: MIT, from the Materials Project, CC BY 4.0 (Bartel et al., npj Comput. Mater. 6, 97 (2020))",
    "matbench_mp_e_form: MIT, from the Materials Project, CC BY 4.0 (Dunn et al., npj Comput. Mater. 6, 138 (2020))",
]


def log(message: str) -> None:
    """Print with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def run_members(
    indices: Sequence[int], kind: str, settings: EnsembleSettings, data: tuple, device: str, folder: Path, compile_network: bool
) -> None:
    """Train some members in their own process and leave their weights in files."""
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(2)
    torch._dynamo.config.recompile_limit = 64  # noqa: SLF001 - members of one shape share code, but are compiled one by one
    if device != "cpu":
        torch.cuda.set_device(device)
    pack, targets, train_rows, validation_rows = data
    train, validation = (labelled_subset(pack, targets, rows, device) for rows in (train_rows, validation_rows))

    def on_epoch(member: int, record: EpochRecord) -> None:
        if member == 0 or record.epoch == settings.train.epochs:
            errors = f"train {record.train_mae:.4f} validation {record.validation_mae:.4f} eV/atom"
            log(f"{kind} member {member} epoch {record.epoch}: {errors}")

    states = folder / recipe_key(settings)
    states.mkdir(exist_ok=True)
    networks = train_members(
        indices, settings, train, validation, state_folder=states, on_epoch=on_epoch, compile_network=compile_network
    )
    where = {
        "torch": str(torch.__version__),
        "device": "CPU" if device == "cpu" else torch.cuda.get_device_name(),
        "trained_with": " ".join(["python", "data/train_ensembles.py", *command_without_paths()]),
    }
    for index, network in zip(indices, networks, strict=True):
        with atomic_write(weights_path(folder, settings, index)) as path:
            torch.save({"weights": network.state_dict(), **where}, path)
        (states / f"member{index}.pt").unlink(missing_ok=True)


def command_without_paths() -> list[str]:
    """Arguments of this run, the two folders named as in the help."""
    options = read_options()
    names = {options.shards: "SHARDS", options.out: "OUT"}
    return [names.get(Path(word), word) for word in sys.argv[1:]]


def recipe_key(settings: EnsembleSettings) -> str:
    """Name of how members are trained; numbers count to six digits, since machines round the labels' mean and deviation differently."""
    how = [
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(one).items()}
        for one in (settings.network, settings.train)
    ]
    return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:12]


def weights_path(folder: Path, settings: EnsembleSettings, index: int) -> Path:
    """Where the weights of a member lie."""
    return folder / f"member{index}-{recipe_key(settings)}.weights.pt"


def train_all(
    kind: str, settings: EnsembleSettings, data: tuple, options: argparse.Namespace
) -> tuple[list[torch.nn.Module], dict[str, str]] | None:
    """Train all members whose weights are not there, at the same time; returns all, and what a card says of where they were trained.

    None where only some were asked for.
    """
    folder = options.out / "state" / kind
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    members = [index for index in range(settings.members) if not weights_path(folder, settings, index).exists()]
    if options.only is not None:
        if unknown := sorted(set(options.only) - set(range(settings.members))):
            raise SystemExit(f"--only {unknown}: the {kind} ensemble has members 0 to {settings.members - 1}")
        members = [index for index in members if index in options.only]
    if options.device == "cpu":
        for index in members:
            run_members([index], kind, settings, data, "cpu", folder, options.compile)
    elif members:
        devices = torch.cuda.device_count()
        count = min(len(members), options.processes * devices)
        groups = [members[i::count] for i in range(count)]
        context = mp.get_context("spawn")
        processes = [
            context.Process(
                target=run_members, args=(group, kind, settings, data, f"cuda:{i % devices}", folder, options.compile)
            )
            for i, group in enumerate(groups)
        ]
        with ThreadPoolExecutor(len(processes)) as pool:  # each start waits for its process to read the data
            list(pool.map(lambda process: process.start(), processes))
        for process in processes:
            process.join()
        if failed := [group for group, process in zip(groups, processes, strict=True) if process.exitcode != 0]:
            raise SystemExit(f"members {failed} of the {kind} ensemble failed; their errors stand above")
    log(f"{kind}: {len(members)} members in {time.perf_counter() - begin:.0f} s")
    paths = [weights_path(folder, settings, index) for index in range(settings.members)]
    if options.only is not None:
        there = sum(path.exists() for path in paths)
        log(f"{folder} holds {there} of {settings.members} members; call again without --only to write the ensemble")
        return None
    networks, found = [], []
    for path in paths:
        found.append(torch.load(path, map_location="cpu", weights_only=True))
        network = untrained(settings.network)
        network.load_state_dict(found[-1].pop("weights"))
        networks.append(network)
    return networks, {name: "; ".join(sorted({one[name] for one in found})) for name in ("torch", "device", "trained_with")}


def member_answers(path: Path, inputs: object, device: str) -> np.ndarray:
    """Answers (members, inputs, ...) of the members as shipped: their weights rounded to FP16."""
    members, _ = load_ensemble(path)
    size = 64 if device == "cpu" else 1024  # what its caches hold
    return np.stack([predict(member.to(device), inputs, batch_size=size).double().cpu().numpy() for member in members])


def ensemble_predictions(path: Path, inputs: object, device: str) -> np.ndarray:
    """Medians over the members, a row an input."""
    return median_and_spread(member_answers(path, inputs, device))[0]


@dataclass(frozen=True)
class Structures:
    """The labelled structures, their split, and what every card says of them."""

    crystals: list[Crystal]
    sources: np.ndarray
    targets: np.ndarray
    split: Split
    card: dict

    @property
    def wbm_test(self) -> np.ndarray:
        """Rows of the test buckets that come from WBM."""
        return self.split.test[self.sources[self.split.test] == "wbm"]

    @property
    def shape(self) -> dict[str, float]:
        """Scale and shift of the networks' answers."""
        train = self.targets[self.split.train]
        return {"scale": float(train.std()), "shift": float(train.mean())}

    def linear_score(self) -> dict:
        """Metrics of a linear model over elements on the WBM test rows."""
        fractions = atomic_fractions([crystal.composition for crystal in self.crystals])
        predicted = fractions @ fit_linear_model(fractions[self.split.train], self.targets[self.split.train])
        return {"linear model over elements, WBM test": score(predicted[self.wbm_test], self.targets[self.wbm_test])}


def read_structures(options: argparse.Namespace) -> Structures:
    """Read the shard that `prepare_training.py` wrote."""
    crystals, columns, _ = read_shard(options.shards / "structures.parquet")
    crystals = crystals[: options.rows]
    split = split_by_formula(columns[Quantity.REDUCED_FORMULA][: options.rows])
    log(f"{len(crystals)} structures: {len(split.train)} train, {len(split.validation)} validation, {len(split.test)} test")
    card = {
        "method": METHOD,
        "elements": sorted({int(z) for i in split.train for z in crystals[i].composition}),
        "licences": LICENCES,
        "split": "md5 of the reduced formula modulo 100: train 0-54, validation 55-59, test 60-69",
    }
    targets = np.array(columns[Quantity.E_FORM_PER_ATOM][: options.rows])
    return Structures(crystals, np.array(columns["source"][: options.rows]), targets, split, card)


SCHEMES = [
    {
        "method": METHOD,
        "labels": "lowest e_form_per_atom of each formula in WBM and Materials Project structures, MP2020 corrections",
    },
    {
        "method": "pbe-mp-critexam",
        "decomposition_energy": True,
        "labels": "e_form_per_atom and decomposition_energy of CritExam (Bartel et al. 2020): Materials Project ground states of 2019 "
        "with the older corrections of that time; not comparable with MP2020",
    },
    {
        "method": "pbe-mp-matbench",
        "labels": "lowest e_form_per_atom of each formula in matbench_mp_e_form, the older corrections",
    },
]
"""The label schemes that formulas are learnt under together, and predictions asked for under one."""


@dataclass(frozen=True)
class Formulas:
    """Labelled formulas of all schemes; rows of the parts, `reported` being CritExam's own validation file."""

    pack: PackedFormulas
    targets: np.ndarray
    split: Split
    reported: np.ndarray


def read_formulas(shards: Path) -> Formulas:
    """Join both shards: no formula of a validation or test part is trained on under any scheme."""
    table = pq.read_table(shards / "formulas.parquet").to_pandas()
    table["scheme"] = table["scheme"].replace(1, 2)
    critexam = pq.read_table(shards / "critexam.parquet").to_pandas().assign(scheme=1)
    joined = pd.concat([table, critexam], ignore_index=True)
    names, scheme = joined[Quantity.REDUCED_FORMULA], joined["scheme"].to_numpy()
    parts = split_by_formula(names.tolist())
    in_file = joined["part"].fillna("").to_numpy()
    reported = np.flatnonzero(in_file == "val")
    unreported = ~names.isin(set(names.iloc[reported])).to_numpy()
    choose = np.isin(np.arange(len(joined)), parts.validation) & (scheme < 2) & unreported
    test = np.isin(np.arange(len(joined)), parts.test) & (scheme == 0)
    held = set(names[choose | test]) | set(names.iloc[reported])
    usable = (in_file == "train") | ((scheme != 1) & np.isin(np.arange(len(joined)), parts.train))
    train = usable & ~names.isin(held).to_numpy()
    pack = PackedFormulas.from_compositions([parse_formula(name) for name in names], scheme.tolist())
    split = Split(np.flatnonzero(train), np.flatnonzero(choose), np.flatnonzero(test))
    return Formulas(pack, joined[list(TARGETS)].to_numpy(dtype=np.float64), split, reported)


def train_compositional(structures: Structures, options: argparse.Namespace) -> None:
    """Train the formula ensemble and write it with its card."""
    formulas = read_formulas(options.shards)
    targets, split = formulas.targets, formulas.split
    own = targets[split.train]
    centre = np.nanmedian(own, 0)
    settings = EnsembleSettings(
        network=replace(
            FORMULA_NETWORK,
            n_schemes=len(SCHEMES),
            shifts=tuple(centre.tolist()),
            scales=tuple(np.nanmean(np.abs(own - centre), 0).tolist()),
        ),
        train=replace(
            FORMULA_TRAIN,
            epochs=options.formula_epochs,
            precision=options.precision,
        ),
        members=options.formula_members,
    )  # fmt: skip
    trained = train_all("compositional", settings, (formulas.pack, targets, split.train, split.validation), options)
    if trained is None:
        return
    members, where = trained
    ship_compositional(members, replace(structures, card=structures.card | where), formulas, settings.train, options)


def ship_compositional(
    members: list[torch.nn.Module], structures: Structures, formulas: Formulas, train: TrainSettings, options: argparse.Namespace
) -> None:
    """Write the formula ensemble with its card: calibrated on the validation part, measured on the test part and CritExam's file."""
    targets, split = formulas.targets, formulas.split
    path = options.out / "compositional.safetensors"
    card = {
        **structures.card,
        "elements": sorted({int(z) for z in formulas.pack.atomic_numbers[split.train].unique() if z}),
        "schemes": SCHEMES,
        "calibrated_on": "the validation part, where a scheme has labels there",
        "licences": FORMULA_LICENCES,
        "training": asdict(train),
        "split": "md5 of the reduced formula modulo 100: train 0-54, validation 55-59, test 60-69; but CritExam's train file trains whole, "
        "buckets 60-99 too, without formulas of any part that is used here, and its validation file is reported.  Whoever measures on "
        "buckets 70-99 leaves its formulas out",
        "trained_on": f"{len(split.train)} labelled formulas, see schemes; none of a formula that any part is chosen by or reported on",
    }
    save_ensemble(path, members, card)
    scheme_of = formulas.pack.scheme.numpy()[split.validation]
    held = member_answers(path, labelled_subset(formulas.pack, targets, split.validation, options.device).inputs, options.device)
    parts = [(held[:, scheme_of == i], targets[split.validation[scheme_of == i]]) for i in range(len(SCHEMES))]
    card["schemes"] = [scheme | {"calibration": calibrate_formulas(*part)} for scheme, part in zip(SCHEMES, parts, strict=True)]
    metrics = structures.linear_score()
    wbm_test = structures.wbm_test
    of_structures = PackedFormulas.from_compositions([structures.crystals[i].composition for i in wbm_test])
    predicted = ensemble_predictions(path, of_structures.to(options.device), options.device)
    metrics["compositional, WBM test structures"] = score(predicted[:, 0], structures.targets[wbm_test])
    inputs = labelled_subset(formulas.pack, targets, split.test, options.device)
    found = member_answers(path, inputs.inputs, options.device)
    name = "compositional, test, lowest energy a formula, MP2020"
    metrics[name] = score(np.median(found[:, :, 0], 0), targets[split.test, 0])
    checked = {name: check_errors(card["schemes"][0]["calibration"], found, targets[split.test])}
    inputs = labelled_subset(formulas.pack, targets, formulas.reported, options.device)
    found = member_answers(path, inputs.inputs, options.device)
    predicted = median_and_spread(found)[0]
    for column, name in enumerate(TARGETS):
        metrics[f"compositional, CritExam validation file, {name}"] = score(
            predicted[:, column], targets[formulas.reported, column]
        )
    own = found, targets[formulas.reported]
    calibration = card["schemes"][1]["calibration"]
    checked["CritExam validation file"] = check_errors(calibration, *own) | {STABLE: check_stable(calibration, parts[1], own)}
    write_card(path, members, {**card, "metrics": metrics, "calibration_checked": checked})


def train_structural(structures: Structures, options: argparse.Namespace) -> None:
    """Train the structure ensemble and write it with its card."""
    name, *changes = options.structure
    network, train = STRUCTURE_RECIPES[name]
    network, train = varied(network, replace(train, precision=options.precision), changes)
    settings = EnsembleSettings(network=replace(network, **structures.shape), train=train, members=options.members)
    begin = time.perf_counter()
    pack = PackedGraphs.from_crystals(structures.crystals, network.cutoff, options.device).to("cpu")  # for all processes
    log(f"graphs: {len(pack.senders):,} edges in {time.perf_counter() - begin:.0f} s")
    split, targets = structures.split, structures.targets
    trained = train_all("structural", settings, (pack, targets, split.train, split.validation), options)
    if trained is None:
        return
    members, where = trained
    path = options.out / "structural.safetensors"
    structures = replace(structures, card=structures.card | where)
    save_ensemble(path, members, structures.card)
    held = labelled_subset(pack, targets, split.validation, options.device)
    card = structures.card | {
        "training": asdict(train),
        "calibration": calibrate_crystals(member_answers(path, held.inputs, options.device), targets[split.validation]),
        "calibrated_on": "the validation part",
    }
    metrics = structures.linear_score()
    wbm_test = structures.wbm_test
    for name, rows in (("WBM", wbm_test), ("Materials Project", np.setdiff1d(split.test, wbm_test))):
        if len(rows):
            inputs = labelled_subset(pack, targets, rows, options.device)
            predicted = ensemble_predictions(path, inputs.inputs, options.device)
            metrics[f"structural, {name} test structures"] = score(predicted, targets[rows])
    trained_on = (
        f"{len(split.train)} structures: unrelaxed initial WBM cells with the DFT energy of their relaxed states, "
        "relaxed Materials Project cells of MP-20 and MPTS-52"
    )
    write_card(path, members, {**card, "trained_on": trained_on, "metrics": metrics})


def write_card(path: Path, members: list[torch.nn.Module], card: dict) -> None:
    """Write the weights once more, with the whole card."""
    log(json.dumps(save_ensemble(path, members, card)["metrics"], indent=1))


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["compositional", "structural"])
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument(
        "--structure",
        nargs="+",
        default=["angular"],
        metavar="WORD",
        help="angular or gnome, and changes, such as width=128 epochs=60",
    )
    parser.add_argument("--formula-epochs", type=int, default=FORMULA_TRAIN.epochs)
    parser.add_argument("--formula-members", type=int, default=10)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--rows", type=int, default=None, help="use only the first rows, for a trial")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processes", type=int, default=2, help="on each GPU")
    parser.add_argument("--only", nargs="+", type=int, metavar="MEMBER", help="train these, and write no ensemble yet")
    return parser.parse_args()


def main() -> None:
    """Train, measure on the test buckets, and write the ensembles with their cards."""
    options = read_options()
    structures = read_structures(options)
    for kind, train in (("compositional", train_compositional), ("structural", train_structural)):
        if kind in options.kinds:
            train(structures, options)


if __name__ == "__main__":
    main()
