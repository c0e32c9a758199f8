"""How the error falls with the size of the training set: a power law, as in figure 1e of Merchant et al., Nature 624, 80 (2023)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import linregress
from scipy.stats import t as student

from gnome.crystals.formula import parse_formula
from gnome.errors import InvalidInput
from gnome.models.datasets import labelled_subset, split_by_formula
from gnome.models.recipes import EnsembleSettings, untrained
from gnome.models.training import Inputs, Run, predict
from gnome.seeds import derived_seed

Rows = NDArray[np.int64]

LEVEL = 0.95
"""Confidence of the interval around an exponent."""

MOST_VALIDATED = 2000
"""Validation examples that choose the epoch of one run."""


@dataclass(frozen=True, kw_only=True)
class ScalingSettings:
    """Sizes of the training sets, from `smallest` to all in `sizes` equal ratios, each with `seeds` subsets and initial weights.

    A run on few examples takes more epochs, so that it has at least `least_steps`.
    """

    smallest: int = 1000
    sizes: int = 6
    seeds: int = 3
    least_steps: int = 2000

    def __post_init__(self) -> None:
        if self.smallest < 1 or self.sizes < 3 or self.seeds < 1 or self.least_steps < 1:
            raise InvalidInput(
                f"smallest {self.smallest}, sizes {self.sizes}, seeds {self.seeds}, least_steps {self.least_steps}: "
                "expected at least 3 sizes, and 1 of all others"
            )

    def training_sizes(self, n: int) -> list[int]:
        """Numbers of examples out of n; raises InvalidInput where they are too few to tell apart."""
        sizes = [round(size) for size in np.geomspace(self.smallest, max(n, self.smallest), self.sizes)]
        if n <= self.smallest * self.sizes or len(set(sizes)) < self.sizes:
            raise InvalidInput(
                f"{n} training examples are too few for {self.sizes} sizes from {self.smallest} up: "
                f"choose a smallest below {n / self.sizes:.0f}"
            )
        return sizes


MOST_ELEMENTS = 4
"""Elements in a crystal that is trained on; those with more are reported apart, as what the networks have never seen."""


def scaling_split(formulas: Sequence[str]) -> tuple[Rows, Rows, dict[str, Rows]]:
    """Rows to train on and to validate on, and those of each reported set that is not empty, by reduced formulas."""
    split = split_by_formula(formulas)
    many = np.array([len(parse_formula(formula)) > MOST_ELEMENTS for formula in formulas], dtype=bool)
    reported = {f"at most {MOST_ELEMENTS} elements": split.test[~many[split.test]], "more": split.test[many[split.test]]}
    train, validation = (rows[~many[rows]] for rows in (split.train, split.validation))
    return train, validation, {name: rows for name, rows in reported.items() if len(rows)}


@dataclass(frozen=True)
class ScalingExamples:
    """Packed inputs and their labels (n,), rows to train on and to choose epochs by, and rows of each set that is reported."""

    inputs: Inputs
    targets: NDArray[np.float64]
    train: Rows
    validation: Rows
    reported: Mapping[str, Rows]


def scaling_run(
    settings: EnsembleSettings, scaling: ScalingSettings, examples: ScalingExamples, n: int, seed: int, device: torch.device | str
) -> Run:
    """Prepare the training of one network on n of the training examples.

    Those of a smaller n are among those of a larger one with the same seed.
    """
    chosen = np.random.default_rng([seed, 0]).permutation(examples.train)[:n]
    held = np.random.default_rng(0).permutation(examples.validation)[:MOST_VALIDATED]
    steps_per_epoch = math.ceil(n / settings.train.batch_size)
    train = replace(
        settings.train,
        seed=derived_seed(settings.train.seed, seed),
        epochs=max(settings.train.epochs, math.ceil(scaling.least_steps / steps_per_epoch)),
    )
    torch.manual_seed(train.seed)
    parts = (labelled_subset(examples.inputs, examples.targets, rows, device) for rows in (chosen, held))
    own, chosen_by = parts
    return Run(network=untrained(settings.network).to(device), train=own, validation=chosen_by, settings=train)


def reported_errors(network: torch.nn.Module, examples: ScalingExamples, device: torch.device | str) -> dict[str, float]:
    """Mean absolute error of each reported set, eV/atom."""
    found = {}
    for name, rows in examples.reported.items():
        part = labelled_subset(examples.inputs, examples.targets, rows, device)
        found[name] = float((predict(network, part.inputs) - part.targets).abs().double().mean())
    return found


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """error = factor * n ** -exponent, and the 95 % interval of the exponent."""

    factor: float
    exponent: float
    low: float
    high: float

    @classmethod
    def fit(cls, sizes: Sequence[int], errors: Sequence[float]) -> "PowerLaw":
        """Fit a line to the logarithms, every run a point; the interval is Student's of its slope."""
        line = linregress(np.log(sizes), np.log(errors))
        width = float(student.ppf(0.5 + LEVEL / 2, len(sizes) - 2)) * float(line.stderr)
        slope = float(line.slope)
        return cls(factor=math.exp(float(line.intercept)), exponent=-slope, low=-slope - width, high=-slope + width)

    def errors(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the law gives for training sets of these sizes, eV/atom."""
        return np.asarray(self.factor * sizes**-self.exponent)
