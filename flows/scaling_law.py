"""`gnome train --scaling-law`: how the error of a structural network falls with the number of crystals it learns from."""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flows.progress import Listener
from flows.training import TrainRequest, memory_for_steps, only_training, read_examples, recipe_for
from gnome.atomic_write import atomic_write
from gnome.errors import InvalidInput
from gnome.models.metrics import Array
from gnome.models.ranks import Ranks
from gnome.models.recipes import EnsembleSettings
from gnome.models.scaling import PowerLaw, ScalingExamples, ScalingSettings, reported_errors, scaling_run, scaling_split
from gnome.models.training import Inputs, fit
from gnome.models.training_state import add_examples

Point = dict[str, Any]


def measure_scaling_law(request: TrainRequest, scaling: ScalingSettings, listener: Listener) -> dict[str, Any]:
    """Train one network on each of growing parts of the training crystals; writes OUT.scaling.json and OUT.scaling.svg, returns the former.

    A measurement that was interrupted goes on when it is asked for again.
    """
    if request.kind != "structural":
        raise InvalidInput("--scaling-law is for structural networks")
    if Ranks.from_environment().world > 1:
        raise InvalidInput("--scaling-law runs in one process; start it without torchrun")
    with only_training(request.out):
        return _measure(request, scaling, listener)


def _measure(request: TrainRequest, scaling: ScalingSettings, listener: Listener) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    read = read_examples(request, device)
    train, validation, reported = scaling_split(read.formulas)
    examples = ScalingExamples(read.inputs, read.targets, train, validation, reported)
    if not len(validation) or not reported:
        raise InvalidInput("the files hold no crystals of the validation or of the test buckets")
    sizes, recipe = scaling.training_sizes(len(train)), recipe_for(request, read.columns[train])
    if not _is_ours(scaling_file(request.out, "json")):
        raise InvalidInput(
            f"{scaling_file(request.out, 'json')}: is no measurement of this kind and would be lost; choose another --out"
        )
    key = _digest(recipe, scaling, read.formulas, read.inputs, read.targets)
    runs = [(n, seed) for n in sizes for seed in range(scaling.seeds)]
    points = _known_points(request.out, key, set(reported), runs)
    n_reported = {name: len(rows) for name, rows in reported.items()}
    known = {(point["n_train"], point["seed"]) for point in points}
    with listener.stage("training", len(runs) - len(known), "runs") as count:
        for n, seed in (run for run in runs if run not in known):
            prepared = scaling_run(recipe, scaling, examples, n, seed, device)
            with memory_for_steps(request):
                fit(prepared.network, prepared.train, prepared.validation, prepared.settings)
            points.append({"n_train": n, "seed": seed, "errors": reported_errors(prepared.network, examples, device)})
            _write(request.out, {"run": key, "points": points})
            count()
    law = summary(points, n_reported) | {"settings": asdict(recipe), "run": key}
    _write(request.out, law)
    draw(law, scaling_file(request.out, "svg"))
    return law


def _digest(recipe: EnsembleSettings, scaling: ScalingSettings, formulas: Sequence[str], inputs: Inputs, targets: Array) -> str:
    """Name a measurement by all that decides it."""
    digest = hashlib.sha256(json.dumps([asdict(recipe), asdict(scaling), list(formulas)]).encode())
    add_examples(digest, inputs, torch.from_numpy(targets))
    return digest.hexdigest()[:16]


def _is_ours(path: Path) -> bool:
    """Whether there is no file, or one that a measurement wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"run": "", "points": []}
        return isinstance(found, dict) and {"run", "points"} <= set(found)
    except (OSError, ValueError, TypeError):
        return False


def _known_points(out: Path, key: str, names: Collection[str], runs: Collection[tuple[int, int]]) -> list[Point]:
    """Read what an interrupted measurement of the same name has left of its runs, each a size and a seed.

    Raises InvalidInput for points that it did not write so.
    """
    path = scaling_file(out, "json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    if found["run"] != key:
        raise InvalidInput(f"{path}: is a measurement of other files or settings; delete it, or choose another --out")
    points, left = found["points"], set(runs)
    for place, point in enumerate(points if isinstance(points, list) else [points], start=1):
        if not _is_point(point, names) or (point["n_train"], point["seed"]) not in left:
            raise InvalidInput(
                f"{path}: point {place} is not one that this measurement wrote, or is there twice; delete the file"
            )
        left.remove((point["n_train"], point["seed"]))
    return list(points)


def _is_point(point: Any, names: Collection[str]) -> bool:
    try:
        errors = [point["errors"][name] for name in names]
        whole = type(point["n_train"]) is int and type(point["seed"]) is int
    except (KeyError, TypeError):
        return False
    return whole and all(type(error) is float and 0 < error < math.inf for error in errors)


def _write(out: Path, law: Mapping[str, Any]) -> None:
    with atomic_write(scaling_file(out, "json")) as temporary:
        temporary.write_text(json.dumps(law, indent=2) + "\n")


def scaling_file(out: Path, suffix: str) -> Path:
    """Where a result of a measurement goes."""
    return out.with_suffix(f".scaling.{suffix}")


def summary(points: Sequence[Point], n_reported: Mapping[str, int]) -> dict[str, Any]:
    """Fit each reported set."""
    sizes = [int(point["n_train"]) for point in points]
    laws = {name: vars(PowerLaw.fit(sizes, [point["errors"][name] for point in points])) for name in n_reported}
    return {"laws": laws, "n_reported": dict(n_reported), "points": list(points)}


def draw(law: Mapping[str, Any], path: Path) -> None:
    """Draw errors and laws on logarithmic axes, without pyplot, whose backend and figures are the caller's own."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only who draws waits for it
    from matplotlib.ticker import ScalarFormatter  # noqa: PLC0415

    figure = Figure(figsize=(6, 4.2), layout="tight")
    axis = figure.subplots()
    sizes = np.array([point["n_train"] for point in law["points"]], dtype=np.float64)
    for colour, (name, own) in zip(("#1f5fa8", "#c2571a", "#3a7d44"), law["laws"].items(), strict=False):
        errors = np.array([point["errors"][name] for point in law["points"]])
        axis.plot(sizes, 1000 * errors, "o", color=colour, alpha=0.6, markersize=5)
        line = np.geomspace(sizes.min(), sizes.max(), 50)
        label = f"{name}: n$^{{-{own['exponent']:.3f}}}$ [{own['low']:.3f}, {own['high']:.3f}]"
        axis.plot(line, 1000 * PowerLaw(**own).errors(line), color=colour, label=label)
    axis.set(xscale="log", yscale="log", xlabel="crystals trained on", ylabel="mean absolute error, meV/atom")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(ScalarFormatter())
    axis.grid(visible=True, which="both", linewidth=0.3)
    axis.legend(frameon=False, fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
