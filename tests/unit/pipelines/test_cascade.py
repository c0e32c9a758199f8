"""Screening in looks: what goes on, and that nothing which the full filter would choose is lost where looks agree with it."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from gnome.errors import InvalidInput
from pipelines.cascade import DEFAULT_LOOKS, Look, best_structures, choose_by_looks
from pipelines.screening import ScreeningSettings

NAMES = ["A", "B", "A", "C", "B", "A", "D"]
VALUES = [0.30, 0.10, 0.20, 0.40, 0.15, 0.31, np.nan]


def test_compositions_are_counted_and_structures_near_their_best_go_along() -> None:
    assert best_structures(VALUES, NAMES, 2, within=0.1) == [1, 4, 2, 0]
    assert best_structures(VALUES, NAMES, 2, within=0.0) == [1, 2]
    assert best_structures(VALUES, NAMES, 9, within=1.0) == [1, 4, 2, 0, 5, 3, 6]
    assert best_structures([], [], 3) == []
    assert best_structures([0.1, 0.1], ["A", "B"], 1) == [0]


class Noisy:
    """True energies, which looks of few members see with an error each."""

    def __init__(self, n: int, deviation: float) -> None:
        rng = np.random.default_rng(0)
        self.true = rng.normal(0, 0.2, n)
        self.seen = self.true + deviation * rng.normal(size=n)
        self.asked: list[tuple[int, int | None, int]] = []

    def __call__(self, rows: Sequence[int], members: int | None, volumes: ScreeningSettings) -> NDArray[np.float64]:
        self.asked.append((len(rows), members, volumes.n_scales))
        return (self.true if members is None else self.seen)[list(rows)]


def test_the_choice_is_the_full_filters_and_few_are_looked_at_closely() -> None:
    n, budget = 5000, 50
    names, energies = [f"X{i // 2}" for i in range(n)], Noisy(n, 0.01)
    expected = choose_by_looks(energies, names, budget, looks=())
    assert len(expected) == budget
    assert len({names[i] for i in expected}) == budget
    assert np.all(np.diff(energies.true[expected]) >= 0)
    energies.asked.clear()
    assert choose_by_looks(energies, names, budget) == expected
    assert [members for _, members, _ in energies.asked] == [1, 3, None]
    assert [scales for _, _, scales in energies.asked] == [1, 3, 20]
    counts = [asked for asked, _, _ in energies.asked]
    assert counts[0] == n
    assert counts[1] < n / 2
    assert counts[2] <= 2 * 3 * budget


def test_what_looks_do_not_see_is_lost() -> None:
    energies = Noisy(2000, 1.0)
    names = [f"X{i}" for i in range(2000)]
    kept = set(choose_by_looks(energies, names, 20)) & set(choose_by_looks(energies, names, 20, looks=()))
    assert len(kept) < 15


@pytest.mark.parametrize("wrong", [{"members": 0}, {"kept": 0.5}])
def test_what_is_no_look_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="expected 1 or more"):
        Look(**{**vars(DEFAULT_LOOKS[0]), **wrong})
