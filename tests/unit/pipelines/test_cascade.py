"""Screening in looks: what goes on, and that nothing which the full filter would choose is lost where looks agree with it."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from gnome.errors import InvalidInput
from pipelines.cascade import FIRST_LOOK, SECOND_LOOK, THIRD_LOOK, Look, best_of_compositions, in_order, passed_looks
from pipelines.screening import ScreeningSettings

NAMES = ["A", "B", "A", "C", "B", "A", "D"]
VALUES = [0.30, 0.10, 0.20, 0.40, 0.15, 0.31, np.nan]


def test_structures_near_the_best_of_their_composition_go_first() -> None:
    assert in_order(VALUES, NAMES, within=0.105) == [1, 4, 2, 0, 3, 6, 5]
    assert in_order(VALUES, NAMES, within=0.0) == [1, 2, 3, 6, 4, 0, 5]
    assert in_order(VALUES, NAMES, within=1.0) == [1, 4, 2, 0, 5, 3, 6]
    assert in_order([], []) == []
    assert in_order([np.nan, 0.1], ["A", "A"]) == [1, 0]


def test_one_structure_of_each_of_the_best_compositions_is_chosen() -> None:
    assert best_of_compositions(VALUES, NAMES, 2) == [1, 2]
    assert best_of_compositions(VALUES, NAMES, 9) == [1, 2, 3, 6]
    assert best_of_compositions([], [], 3) == []
    assert best_of_compositions([0.1, 0.1], ["A", "B"], 1) == [0]


class Noisy:
    """True energies, which looks see with an error each."""

    def __init__(self, n: int, deviation: float) -> None:
        rng = np.random.default_rng(0)
        self.true = rng.normal(0, 0.2, n)
        self.seen = self.true + deviation * rng.normal(size=n)
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, rows: Sequence[int], members: int, volumes: ScreeningSettings) -> NDArray[np.float64]:
        self.asked.append((len(rows), members, volumes.n_scales))
        return self.seen[list(rows)]


def test_what_the_full_filter_would_choose_passes_and_little_else() -> None:
    n, budget = 5000, 50
    names, energies = [f"X{i // 2}" for i in range(n)], Noisy(n, 0.01)
    expected = best_of_compositions(energies.true, names, budget)
    assert len({names[i] for i in expected}) == len(expected) == budget
    passed = passed_looks(energies, names, budget)
    assert set(expected) <= set(passed)
    assert len(passed) == THIRD_LOOK.kept * budget
    assert [asked[1:] for asked in energies.asked] == [(1, 1), (3, 1), (THIRD_LOOK.members, 1)]
    assert energies.asked[0][0] == n
    assert [asked[0] for asked in energies.asked[1:]] == [FIRST_LOOK.kept * budget, SECOND_LOOK.kept * budget]
    assert energies.asked[1][0] < n / 2
    assert passed_looks(energies, names, budget, looks=()) == list(range(n))


def test_what_looks_do_not_see_is_lost() -> None:
    energies, names = Noisy(2000, 1.0), [f"X{i}" for i in range(2000)]
    assert len(set(passed_looks(energies, names, 20)) & set(best_of_compositions(energies.true, names, 20))) < 15


@pytest.mark.parametrize("wrong", [{"members": 0}, {"kept": 0.5}])
def test_what_is_no_look_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="expected 1 or more"):
        Look(**{**vars(FIRST_LOOK), **wrong})
