"""`gnome train`: shards of labelled crystals in, an ensemble with its card out."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from flows.progress import Listener
from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import parse_formula
from gnome.errors import InvalidInput
from gnome.models.checkpoint import load_ensemble, save_ensemble
from gnome.models.datasets import labelled_subset, pack_crystals, read_labelled_crystals, split_by_formula
from gnome.models.ensemble import median_and_spread
from gnome.models.formula_graph import FormulaGraphSettings
from gnome.models.formulas import PackedFormulas
from gnome.models.linear import Precision
from gnome.models.metrics import Array, atomic_fractions, fit_linear_model, score
from gnome.models.recipes import EnsembleSettings, train_member
from gnome.models.structural import StructuralSettings
from gnome.models.training import EpochRecord, Inputs, TrainSettings, predict

MIN_EXAMPLES = 20


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What `gnome train` was asked for."""

    kind: str
    files: tuple[Path, ...]
    out: Path
    method: str
    members: int
    width: int
    epochs: int
    batch_size: int
    learning_rate: float
    precision: str
    seed: int

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.kind not in {"structural", "compositional"}:
            raise InvalidInput(f"kind {self.kind!r}, expected structural or compositional")
        if not self.method:
            raise InvalidInput("name the method behind the energies with --method, for example --method pbe-mp2020")
        if self.precision not in {"fp32", "bf16", "fp8"}:
            raise InvalidInput(f"precision {self.precision!r}, expected fp32, bf16 or fp8")
        if self.out.suffix != ".safetensors":
            raise InvalidInput(f"--out {self.out}: the name of weights ends in .safetensors")
        for name in ("members", "width", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}, expected 1 or more")


def train_files(request: TrainRequest, listener: Listener) -> dict[str, Any]:
    """Train and measure; returns the card as it was written."""
    crystals, targets = read_labelled_crystals(request.files)
    inputs, targets, formulas = _inputs(request.kind, crystals, targets)
    split = split_by_formula(formulas)
    if min(len(split.train), len(split.validation)) < MIN_EXAMPLES:
        raise InvalidInput(
            f"{len(split.train)} examples to train and {len(split.validation)} to validate on (split by the hash of the formula); "
            f"at least {MIN_EXAMPLES} of each are needed"
        )
    scale, shift = float(targets[split.train].std()) or 1.0, float(targets[split.train].mean())
    kind = StructuralSettings if request.kind == "structural" else FormulaGraphSettings
    network = kind(width=request.width, scale=scale, shift=shift)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = EnsembleSettings(
        network=network,
        train=TrainSettings(
            epochs=request.epochs,
            batch_size=request.batch_size,
            learning_rate=request.learning_rate,
            precision=cast(Precision, request.precision),
            volume_jitter=0.1 if request.kind == "structural" else 0.0,
            seed=request.seed,
        ),
        members=request.members,
    )
    train, validation, test = (
        labelled_subset(inputs, targets, rows, device) for rows in (split.train, split.validation, split.test)
    )
    state = request.out.with_suffix(".state")
    with listener.stage("training", request.members * request.epochs, "epochs") as count:

        def on_epoch(_member: int, _record: EpochRecord) -> None:
            count()

        members = [
            train_member(i, recipe, train, validation, state_folder=state, on_epoch=on_epoch) for i in range(request.members)
        ]
    card: dict[str, Any] = {
        "method": request.method,
        "elements": sorted({z for i in split.train for z in parse_formula(formulas[i])}),
        "trained_on": f"{len(split.train)} examples of {', '.join(path.name for path in request.files)}",
        "split": "md5 of the reduced formula modulo 100: train 0-54, validation 55-59, test 60-69",
        "metrics": {},
    }
    written = save_ensemble(request.out, members, card)
    if len(split.test) > 1:
        fractions = atomic_fractions([parse_formula(formula) for formula in formulas])
        linear = fractions @ fit_linear_model(fractions[split.train], targets[split.train])
        shipped, _ = load_ensemble(request.out)  # the weights as they were rounded for the file
        energies = np.stack([predict(member.to(device), test.inputs).double().cpu().numpy() for member in shipped])
        card["metrics"] = {
            "linear model over elements": score(linear[split.test], targets[split.test]),
            f"{request.kind} ensemble": score(median_and_spread(energies)[0], targets[split.test]),
        }
        written = save_ensemble(request.out, members, card)
    shutil.rmtree(state, ignore_errors=True)
    return written


def _inputs(kind: str, crystals: Sequence[Crystal], targets: Array) -> tuple[Inputs, Array, list[str]]:
    """Pack graphs of all crystals, or formulas with their lowest energies."""
    if kind == "structural":
        pack = pack_crystals(crystals, StructuralSettings().cutoff, workers=2)
        return pack, targets, [crystal.reduced_formula for crystal in crystals]
    lowest: dict[str, float] = {}
    for crystal, target in zip(crystals, targets, strict=True):
        lowest[crystal.reduced_formula] = min(float(target), lowest.get(crystal.reduced_formula, float("inf")))
    formulas = sorted(lowest)
    pack_of_formulas = PackedFormulas.from_compositions([parse_formula(formula) for formula in formulas])
    return pack_of_formulas, np.array([lowest[formula] for formula in formulas]), formulas
