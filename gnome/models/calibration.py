"""How far predictions are off, learnt from residuals of examples that no network was trained on.

Errors of ensembles have heavy tails, which a normal distribution puts into a handful of impossible outliers: on held-out formulas
Student's distribution with some two degrees of freedom, its scale a power of what the members say, covers what it promises, where they
doubt little as where they doubt much.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import t as student

Array = NDArray[np.float64]

LEVEL = 0.68
"""Part of the truths that lie within an uncertainty, as one standard deviation of a normal distribution holds."""

MIN_EXAMPLES = 50
"""Residuals below which nothing is fitted unless fewer are said to do."""

_SMALLEST = 1e-6
_BOUNDS = ((np.log(_SMALLEST), 3.0), (-30.0, 30.0), (np.log(0.25), np.log(4.0)), (np.log(1.2), np.log(200.0)))


@dataclass(frozen=True, kw_only=True)
class ErrorCalibration:
    """Errors (eV/atom) follow Student's distribution with `degrees` of freedom and the scale sqrt(floor^2 + (factor width^power)^2).

    The width is what an ensemble says of its own doubt, in eV/atom; where it doubts much it is usually off by more than in proportion.
    """

    floor: float
    factor: float
    power: float
    degrees: float

    def __post_init__(self) -> None:
        """Refuse what is no distribution."""
        if not all(type(number) is float and 0 <= number < math.inf for number in vars(self).values()):
            raise ValueError(f"{self}: expected numbers of at least 0")
        if self.floor == 0 or self.degrees == 0:
            raise ValueError(f"{self}: expected a floor and degrees above 0")

    @classmethod
    def fit(cls, errors: Array, widths: Array, *, least: int | None = None) -> Self | None:
        """Fit by maximum likelihood; None where there are fewer than `least` errors, `MIN_EXAMPLES` unless given."""
        if len(errors) < (MIN_EXAMPLES if least is None else least):
            return None
        typical = float(np.median(np.abs(errors))) + _SMALLEST
        start = np.log([typical / 2, typical / (float(np.median(widths)) + _SMALLEST), 1.0, 3.0])

        def loss(logs: Array) -> float:
            made = cls._of_logs(logs)
            scales = made.scales(widths)
            return float((np.log(scales) - student.logpdf(errors / scales, made.degrees)).mean())

        low, high = np.transpose(_BOUNDS)
        options = {"maxiter": 4000, "maxfev": 4000, "xatol": 1e-5, "fatol": 1e-9, "adaptive": True}
        found = start
        for _ in range(3):  # a simplex that has shrunk too early begins anew
            found = minimize(loss, np.clip(found, low, high), method="Nelder-Mead", bounds=_BOUNDS, options=options).x
        return cls._of_logs(found)

    @classmethod
    def _of_logs(cls, logs: Array) -> Self:
        floor, factor, power, degrees = np.exp(logs).tolist()
        return cls(floor=floor, factor=factor, power=power, degrees=degrees)

    def scales(self, widths: Array) -> Array:
        """Scale of the distribution for each width, eV/atom."""
        return np.asarray(np.hypot(self.floor, self.factor * widths**self.power))

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
        if not all(type(number) is float and math.isfinite(number) for number in vars(self).values()):
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
        return np.asarray(expit(self.slope * logits + self.intercept))


def coverage(errors: Array, half_widths: Array) -> float:
    """Part of the errors that lie within their half widths."""
    return float((np.abs(errors) <= half_widths).mean())


def coverage_by_width(errors: Array, half_widths: Array, *, groups: int = 5) -> list[float]:
    """Coverage within groups of equally many examples, from the narrowest intervals to the widest."""
    order = np.argsort(half_widths, kind="stable")
    return [coverage(errors[rows], half_widths[rows]) for rows in np.array_split(order, groups)]


def expected_calibration_error(probabilities: Array, happened: NDArray[np.bool_], *, bins: int = 10) -> float:
    """Mean over examples of |mean probability - frequency| of their bin, bins of equal width (Naeini et al., AAAI 2015)."""
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    n = np.bincount(place, minlength=bins)
    gaps = np.abs(np.bincount(place, probabilities, bins) - np.bincount(place, happened.astype(float), bins))
    return float(gaps.sum() / n.sum())
