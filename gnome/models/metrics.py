"""How good predictions are, with bootstrap intervals; numbers in, numbers out.  Not-a-number predictions are refused, not skipped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from gnome.crystals.elements import MAX_ATOMIC_NUMBER

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile-bootstrap interval of 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Value with interval."""
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def mean_absolute_error(predicted: Array, target: Array) -> float:
    """Mean of |predicted - target|."""
    return float(np.abs(predicted - target).mean())


def spearman(predicted: Array, target: Array) -> float:
    """Rank correlation; ties take their average rank; 0 where one side is constant."""
    a, b = rankdata(predicted), rankdata(target)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def f1(said: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is said or true."""
    return float(2 * (said & true).sum() / max(int(said.sum() + true.sum()), 1))


def auc(scores: Array, true: NDArray[np.bool_]) -> float:
    """Probability that a true example scores above another (Mann-Whitney); NaN where all are alike."""
    n, others = int(true.sum()), int((~true).sum())
    return float((rankdata(scores)[true].sum() - n * (n + 1) / 2) / (n * others)) if n and others else float("nan")


def best_threshold(scores: Array, true: NDArray[np.bool_]) -> float:
    """Return the score above which to say true for the best F1, out of the quantiles of the scores."""
    tried = np.quantile(scores, np.linspace(0.02, 0.98, 97))
    return float(max(tried, key=lambda one: f1(scores > one, true)))


def bootstrap(statistic: Callable[..., float], *columns: Array, n_resamples: int = 1000, seed: int = 0) -> Interval:
    """Percentile bootstrap of a statistic over rows of the columns.

    Raises ValueError when a column holds a value that is not finite or lengths differ.
    """
    n = len(columns[0])
    if n == 0 or any(len(column) != n for column in columns):
        raise ValueError(f"bootstrap needs columns of one positive length, got {[len(column) for column in columns]}")
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError("bootstrap was given a value that is not finite")
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(n_resamples):
        rows = generator.integers(0, n, n)
        draws.append(statistic(*(column[rows] for column in columns)))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(statistic(*columns), float(low), float(high))


def score(predicted: Array, target: Array) -> dict[str, Any]:
    """Mean absolute error (eV/atom) and rank correlation with their intervals, as cards keep them."""
    mae = bootstrap(mean_absolute_error, predicted, target)
    rank = bootstrap(spearman, predicted, target, n_resamples=300)
    return {"n": len(target), "mae": asdict(mae), "spearman": asdict(rank)}


def atomic_fractions(compositions: Sequence[Mapping[int, int]]) -> Array:
    """Share of every element in compositions given by atomic number, shape (n, 104)."""
    fractions = np.zeros((len(compositions), MAX_ATOMIC_NUMBER + 1))
    for row, composition in zip(fractions, compositions, strict=True):
        for z, amount in composition.items():
            row[z] = amount / sum(composition.values())
    return fractions


def fit_linear_model(fractions: Array, targets: Array) -> Array:
    """Least-squares energy of each element (columns of `fractions`), the baseline every network must beat."""
    coefficients, *_ = np.linalg.lstsq(fractions, targets, rcond=None)
    return np.asarray(coefficients)
