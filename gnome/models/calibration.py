"""How far predictions are off, learnt from residuals of examples that no network was trained on.

Errors of ensembles have heavy tails, which a normal distribution puts into a handful of impossible outliers: on held-out formulas
Student's distribution with some two degrees of freedom, its width following what the members say, covers what it promises.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import t as student

Array = NDArray[np.float64]

LEVEL = 0.68
"""Part of the truths that lie within an uncertainty, as one standard deviation of a normal distribution holds."""

MIN_EXAMPLES = 50
"""Residuals below which nothing is fitted."""

_SMALLEST = 1e-6
_BOUNDS = ((np.log(_SMALLEST), 3.0), (-8.0, 8.0), (np.log(1.2), np.log(200.0)))


@dataclass(frozen=True, kw_only=True)
class ErrorCalibration:
    """Errors (eV/atom) follow Student's distribution with `degrees` of freedom, scaled by sqrt(floor^2 + (factor width)^2).

    The width is what an ensemble says of its own doubt, in eV/atom.
    """

    floor: float
    factor: float
    degrees: float

    def __post_init__(self) -> None:
        """Refuse what is no distribution."""
        if not (0 <= self.floor < math.inf and 0 <= self.factor < math.inf and 0 < self.degrees < math.inf):
            raise ValueError(f"{self}: expected numbers of at least 0")

    @classmethod
    def fit(cls, errors: Array, widths: Array) -> Self | None:
        """Fit by maximum likelihood; None where there are fewer than `MIN_EXAMPLES` errors."""
        if len(errors) < MIN_EXAMPLES:
            return None
        typical = float(np.median(np.abs(errors))) + _SMALLEST
        start = np.log([typical / 2, typical / (float(np.median(widths)) + _SMALLEST), 3.0])

        def loss(logs: Array) -> float:
            made = cls._of_logs(logs)
            scales = made.scales(widths)
            return float((np.log(scales) - student.logpdf(errors / scales, made.degrees)).mean())

        low, high = np.transpose(_BOUNDS)
        return cls._of_logs(minimize(loss, np.clip(start, low, high), method="Nelder-Mead", bounds=_BOUNDS).x)

    @classmethod
    def _of_logs(cls, logs: Array) -> Self:
        floor, factor, degrees = np.exp(logs).tolist()
        return cls(floor=floor, factor=factor, degrees=degrees)

    def scales(self, widths: Array) -> Array:
        """Scale of the distribution for each width, eV/atom."""
        return np.hypot(self.floor, self.factor * widths)

    def half_widths(self, widths: Array, level: float = LEVEL) -> Array:
        """Half of the interval around a prediction that holds the truth with probability `level`, eV/atom."""
        return self.scales(widths) * float(student.ppf(0.5 + level / 2, self.degrees))

    def probability_below(self, margins: Array, widths: Array) -> Array:
        """Probability that a truth lies at most `margins` (eV/atom) above its prediction."""
        return np.asarray(student.cdf(margins / self.scales(widths), self.degrees))


@dataclass(frozen=True, kw_only=True)
class LogitCalibration:
    """Probability of an event 1 / (1 + exp(-(slope logit + intercept))) (Platt scaling)."""

    slope: float
    intercept: float

    def __post_init__(self) -> None:
        """Refuse what is no line."""
        if not (math.isfinite(self.slope) and math.isfinite(self.intercept)):
            raise ValueError(f"{self}: expected two numbers")

    @classmethod
    def fit(cls, logits: Array, happened: NDArray[np.bool_]) -> Self | None:
        """Fit by maximum likelihood; None where there are fewer than `MIN_EXAMPLES`, or where it always or never happened."""
        if len(logits) < MIN_EXAMPLES or happened.all() or not happened.any():
            return None
        sign = np.where(happened, 1.0, -1.0)
        found = minimize(
            lambda line: float(np.logaddexp(0, -sign * (line[0] * logits + line[1])).mean()), [1.0, 0.0], method="BFGS"
        )
        slope, intercept = found.x.tolist()
        return cls(slope=slope, intercept=intercept)

    def probabilities(self, logits: Array) -> Array:
        """Probability for each logit."""
        return np.asarray(1 / (1 + np.exp(-(self.slope * logits + self.intercept))))


def coverage(errors: Array, half_widths: Array) -> float:
    """Part of the errors that lie within their half widths."""
    return float((np.abs(errors) <= half_widths).mean())


def expected_calibration_error(probabilities: Array, happened: NDArray[np.bool_], *, bins: int = 10) -> float:
    """Mean over examples of |mean probability - frequency| of their bin, bins of equal width (Naeini et al., AAAI 2015)."""
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    n = np.bincount(place, minlength=bins)
    gaps = np.abs(np.bincount(place, probabilities, bins) - np.bincount(place, happened.astype(float), bins))
    return float(gaps.sum() / n.sum())
