"""`gnome train`: labelled crystals or formulas in, an ensemble with its card out."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from flows.lock import held
from flows.progress import Listener
from flows.settings import PRECISIONS
from flows.training_data import labelled_crystals, labelled_formulas
from flows.training_log import Parity, TrainingLog
from gnome.atomic_write import require_writable
from gnome.crystals.formula import parse_formula
from gnome.errors import InvalidCheckpoint, InvalidInput
from gnome.graphs.crystal_graph import PackedGraphs
from gnome.models.angular_network import AngularSettings
from gnome.models.checkpoint import Network, load_ensemble, read_card, save_ensemble
from gnome.models.compositional import TARGETS, CompositionalSettings
from gnome.models.datasets import Split, labelled_subset, split_by_formula
from gnome.models.ensemble import calibrate_crystals, median_and_spread
from gnome.models.formula_ensemble import calibrate_formulas
from gnome.models.linear import Precision
from gnome.models.memory import memory_named
from gnome.models.metrics import Array, atomic_fractions, fit_linear_model, score
from gnome.models.ranks import Ranks
from gnome.models.recipes import STRUCTURE_RECIPES, EnsembleSettings, NetworkSettings, train_members
from gnome.models.structural import StructuralSettings
from gnome.models.training import EpochRecord, Inputs, Labelled, TrainSettings, predict

MIN_EXAMPLES = 20
AVERAGED_EPOCHS = 2
"""Epochs over which the weights of formula networks are averaged."""


FORMULA_DEFAULTS = CompositionalSettings(width=128), TrainSettings()
"""A formula network of middle size, and how it is trained."""


def defaults_for(kind: str, network: str) -> tuple[NetworkSettings, TrainSettings]:
    """Return a network and how it is trained where nothing is asked for; raises InvalidInput for what there is not."""
    if kind == "compositional":
        return FORMULA_DEFAULTS
    if kind != "structural":
        raise InvalidInput(f"kind {kind!r}, expected structural or compositional")
    if network not in STRUCTURE_RECIPES:
        raise InvalidInput(f"network {network!r}, expected {' or '.join(STRUCTURE_RECIPES)}")
    return STRUCTURE_RECIPES[network]


def check_out(out: Path, files: Sequence[Path], method: str) -> None:
    """Refuse, before anything is read, sources, a place for the weights or a method that cannot be used."""
    if not method:
        raise InvalidInput("name the method behind the energies with --method, for example --method pbe-mp2020")
    if out.suffix != ".safetensors":
        raise InvalidInput(f"--out {out}: the name of weights ends in .safetensors")
    _check_target(out)
    if twice := sorted({str(file) for file in files if sum(file.resolve() == one.resolve() for one in files) > 1}):
        raise InvalidInput(f"{', '.join(twice)}: given more than once; its examples would count twice")


def check_precision(name: str) -> Precision:
    """Return a precision; raises InvalidInput for one that there is not."""
    if name not in PRECISIONS:
        raise InvalidInput(f"precision {name!r}, expected fp32, bf16 or fp8")
    return cast(Precision, name)


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What `gnome train` was asked for; `network` is of structural ensembles."""

    kind: str
    network: str
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
    energy_key: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        defaults_for(self.kind, self.network)
        check_out(self.out, self.files, self.method)
        check_precision(self.precision)
        for name, most in (("members", 1000), ("width", 8192), ("epochs", 1_000_000), ("batch_size", 1_000_000)):
            if not 1 <= getattr(self, name) <= most:
                raise InvalidInput(f"{name} is {getattr(self, name)}, expected 1 to {most}")
        if not 0 <= self.seed < 2**63:
            raise InvalidInput(f"seed is {self.seed}, expected 0 or more")
        if not 0 < self.learning_rate < math.inf:
            raise InvalidInput(f"learning_rate is {self.learning_rate}, expected a number above 0")


@dataclass(frozen=True)
class Examples:
    """What to train on: inputs, their labels (n,) or (n, targets), and their formulas."""

    inputs: Inputs
    targets: Array
    formulas: list[str]

    @property
    def columns(self) -> Array:
        """Labels as columns (n, targets)."""
        return self.targets.reshape(len(self.targets), -1)


def train_files(request: TrainRequest, listener: Listener) -> dict[str, Any] | None:
    """Train and measure; returns the card as it was written.

    Processes that torchrun started share the members, and the folder that `out` is in; all but the first return None.
    """
    ranks = Ranks.from_environment()
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    examples = read_examples(request, ranks.device)
    split = split_by_formula(examples.formulas)
    if min(len(split.train), len(split.validation)) < MIN_EXAMPLES:
        raise InvalidInput(
            f"{len(split.train)} examples to train and {len(split.validation)} to validate on (split by the hash of the formula); "
            f"at least {MIN_EXAMPLES} of each are needed, which takes some {20 * MIN_EXAMPLES} of them{_advice(request)}"
        )
    parts = {
        name: labelled_subset(examples.inputs, examples.targets, getattr(split, name), ranks.device)
        for name in ("train", "validation", "test")
    }
    recipe = recipe_for(request, examples.columns[split.train])
    with only_training(request.out) if ranks.rank == 0 else nullcontext():
        with memory_for_steps(request):
            members = _train(request, recipe, parts, ranks, listener)
        return None if members is None else _shipped(request, members, examples, split, parts)


def _advice(request: TrainRequest) -> str:
    return "; fewer crystals can teach an ensemble that there is: --fine-tune" if request.kind == "structural" else ""


def memory_for_steps(request: TrainRequest) -> AbstractContextManager[None]:
    """Context of training, which says what takes less memory where there is too little."""
    return memory_named(f"batches of {request.batch_size} at width {request.width} are too large: give less of either")


def _shipped(
    request: TrainRequest, members: Sequence[Network], examples: Examples, split: Split, parts: Mapping[str, Labelled]
) -> dict[str, Any]:
    """Write the weights, measure them as they were rounded for the file, and write their card; returns it."""
    card: dict[str, Any] = {
        "method": request.method,
        "elements": sorted({z for i in split.train for z in parse_formula(examples.formulas[i])}),
        "trained_on": f"{len(split.train)} examples of {', '.join(path.name for path in request.files)}",
        "split": "md5 of the reduced formula modulo 100: train 0-54, validation 55-59, test 60-69",
        "metrics": {},
    }
    save_ensemble(request.out, members, card)
    shipped, _ = load_ensemble(request.out)
    found, parity = _measured(request, shipped, examples, split, parts)
    written = save_ensemble(request.out, members, card | found)
    TrainingLog(request.out).finish(request.members, request.epochs, parity)
    forget_states(request.out, request.members)
    return written


def _train(
    request: TrainRequest, recipe: EnsembleSettings, parts: Mapping[str, Labelled], ranks: Ranks, listener: Listener
) -> list[Network] | None:
    """Train this process's share of the members; the first process returns all, when the others are done."""
    state = state_folder(request.out)
    log = TrainingLog(request.out)
    if ranks.rank == 0 and not any(state.glob("member*.pt")):
        log.begin()
    ranks.wait()
    own = ranks.share(request.members)
    with listener.stage("training", len(own) * request.epochs, "epochs") as count:

        def on_epoch(member: int, record: EpochRecord) -> None:
            log.add(member, record)
            count()

        together = ranks.device.type == "cuda" and request.kind == "compositional"  # small ones fill a GPU so
        data = parts["train"], parts["validation"]
        trained = {
            index: network
            for group in ([own] if together else [[index] for index in own])
            for index, network in zip(
                group, train_members(group, recipe, *data, state_folder=state, on_epoch=on_epoch), strict=True
            )
        }
    ranks.wait()
    if ranks.rank > 0:
        return None
    others = [index for index in range(request.members) if index not in trained]
    if missing := [index for index in others if not (state / f"member{index}.pt").exists()]:
        raise InvalidInput(
            f"{state}: members {missing}, trained by other processes, are not there; all need the folder of --out in common"
        )
    trained |= dict(
        zip(others, train_members(others, recipe, *data, state_folder=state), strict=True)
    )  # as their states are whole
    return [trained[index] for index in range(request.members)]


def _measured(
    request: TrainRequest, members: Sequence[Network], examples: Examples, split: Split, parts: Mapping[str, Labelled]
) -> tuple[dict[str, Any], Parity]:
    """What a card says of the errors of members: calibration on the validation part, metrics on the test part; and the former to draw."""

    def answers(part: Labelled) -> Array:
        device = part.targets.device
        return np.stack([predict(member.to(device), part.inputs).double().cpu().numpy() for member in members])

    found: dict[str, Any] = {}
    of_validation = answers(parts["validation"]), examples.targets[split.validation]
    if request.kind == "compositional":
        knows = {str(name): bool(np.isfinite(examples.columns[split.train, i]).any()) for i, name in enumerate(TARGETS)}
        found["schemes"] = [{"method": request.method, **knows, "calibration": calibrate_formulas(*of_validation)}]
    else:
        found["calibration"] = calibrate_crystals(*of_validation)
    if len(split.test) > 1:
        found["metrics"] = measured(request.kind, examples, split, median_and_spread(answers(parts["test"]))[0])
    medians, labels = median_and_spread(of_validation[0])[0], of_validation[1]
    return found, Parity(labels=labels.reshape(len(labels), -1)[:, 0], predicted=medians.reshape(len(medians), -1)[:, 0])


def forget_states(out: Path, members: int) -> None:
    """Remove what an interrupted training of so many members would be taken up from."""
    state = state_folder(out)
    for i in range(members):
        (state / f"member{i}.pt").unlink(missing_ok=True)
    with suppress(OSError):  # a folder that holds something else stays
        state.rmdir()


def only_training(out: Path) -> AbstractContextManager[None]:
    """Context in which no other process trains what goes to `out`."""
    return held(
        out.with_name(f".{out.stem}.training.lock"),
        f"--out {out}: another training writes there; wait for it, or choose another name",
    )


def state_folder(out: Path) -> Path:
    """Where an interrupted training of these weights is kept."""
    return out.with_suffix(".state")


def _check_target(out: Path) -> None:
    """Refuse, before hours of training, a place where the weights or their card cannot go or would replace something else."""
    if "{sha256}" in out.name:
        raise InvalidInput(f"--out {out}: give a name without {{sha256}}")
    if out.is_dir():
        raise InvalidInput(f"--out {out}: is a folder; name a file in it")
    log = TrainingLog(out)
    for beside in (log.path, log.picture, log.before):
        if beside.is_dir():
            raise InvalidInput(f"--out {out}: {beside}, which a training writes, is a folder; choose another name")
    if state_folder(out).exists() and not state_folder(out).is_dir():
        raise InvalidInput(
            f"--out {out}: {state_folder(out)}, where an interrupted training is kept, is a file; choose another name"
        )
    for suffix in ("json", "svg"):
        if out.with_suffix(f".scaling.{suffix}").is_dir():
            raise InvalidInput(f"--out {out}: {out.with_suffix(f'.scaling.{suffix}')}, which may be written, is a folder")
    stopped = any(state_folder(out).glob("member*.pt"))  # weights are written before their card
    if out.exists() and not out.with_suffix(".json").exists() and not stopped:
        raise InvalidInput(f"--out {out}: is there without a card, so it may be something else; choose another name")
    if not log.is_ours():
        raise InvalidInput(
            f"--out {out}: {log.path}, where the log goes, is no log of a training and would be lost; choose another name"
        )
    card = out.with_suffix(".json")
    if card.exists():
        try:
            read_card(out)
        except InvalidCheckpoint as error:
            raise InvalidInput(
                f"--out {out}: {card}, where the card goes, cannot be read as one and would be lost ({error}); choose another name"
            ) from None
    require_writable(out)


def read_examples(request: TrainRequest, device: torch.device) -> Examples:
    """Pack graphs of all crystals, found on a device, or formulas with their lowest energies."""
    if request.kind == "structural":
        crystals, energies = labelled_crystals(request.files, energy_key=request.energy_key)
        with memory_named(f"the graphs of {len(crystals)} crystals are too large together: give fewer"):
            pack = PackedGraphs.from_crystals(crystals, STRUCTURE_RECIPES[request.network][0].cutoff, device)
        return Examples(pack, energies, [crystal.reduced_formula for crystal in crystals])
    labelled = labelled_formulas(request.files, energy_key=request.energy_key)
    return Examples(labelled.pack(), labelled.targets, labelled.formulas)


def recipe_for(request: TrainRequest, targets: Array) -> EnsembleSettings:
    """Choose the network and how it is trained, given the training part's labels (n, targets)."""
    centres, spreads = (_of_known(targets, f, default) for f, default in ((np.mean, 0.0), (np.std, 1.0)))
    usual, train = defaults_for(request.kind, request.network)
    train = replace(
        train,
        epochs=request.epochs,
        batch_size=request.batch_size,
        learning_rate=request.learning_rate,
        precision=cast(Precision, request.precision),
        seed=request.seed,
    )
    in_fp8 = request.precision == "fp8" and request.width >= train.fp8_min_features  # such weights are not averaged
    if isinstance(usual, StructuralSettings | AngularSettings):
        if isinstance(usual, AngularSettings):
            usual = replace(usual, hidden=request.width)
        shape = replace(usual, width=request.width, scale=spreads[0], shift=centres[0])
        averaged = 0.0 if in_fp8 else train.ema_decay
        return EnsembleSettings(network=shape, train=replace(train, ema_decay=averaged), members=request.members)
    heads = next(heads for heads in (8, 4, 2, 1) if request.width % heads == 0)
    network = CompositionalSettings(width=request.width, heads=heads, scales=tuple(spreads), shifts=tuple(centres))
    steps = max(2.0, AVERAGED_EPOCHS * len(targets) / request.batch_size)
    averaged = 0.0 if in_fp8 else 1 - 1 / steps
    train = replace(train, warm_up=0.05, fraction_jitter=0.02, ema_decay=averaged)
    return EnsembleSettings(network=network, train=train, members=request.members)


def _of_known(targets: Array, statistic: Callable[[Array], Any], default: float) -> list[float]:
    """Apply to the known labels of each column."""
    known = [column[np.isfinite(column)] for column in targets.T]
    return [float(statistic(column)) or default if len(column) else default for column in known]


def measured(kind: str, examples: Examples, split: Split, medians: Array) -> dict[str, Any]:
    """Score the medians of the ensemble (n,) or (n, answers) on the test part, beside a linear model over elements."""
    fractions = atomic_fractions([parse_formula(formula) for formula in examples.formulas])
    metrics = {}
    for column in range(examples.columns.shape[1]):
        labels = examples.columns[:, column]
        train = split.train[np.isfinite(labels[split.train])]
        known = np.isfinite(labels[split.test])
        if min(len(train), known.sum()) < 2:
            continue
        test = split.test[known]
        linear = fractions[test] @ fit_linear_model(fractions[train], labels[train])
        of_target = "" if column == 0 else f", {TARGETS[column]}"
        metrics[f"linear model over elements{of_target}"] = score(linear, labels[test])
        predicted = medians.reshape(len(medians), -1)[known, column]
        metrics[f"{kind} ensemble{of_target}"] = score(predicted, labels[test])
    return metrics
