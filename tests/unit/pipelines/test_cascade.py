"""Screening in looks: what goes on, and that nothing which the full filter would choose is lost where looks agree with it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from emt_world import l1_0, l1_2
from numpy.typing import NDArray

from gnome.errors import InvalidInput
from gnome.models.ensemble import StructuralEnsemble
from gnome.models.structural import StructuralNetwork, StructuralSettings
from pipelines.cascade import FIRST_LOOK, LOOKS, SECOND_LOOK, THIRD_LOOK, Look, best_of_compositions, go_on, looking, passed_looks

NAMES = ["A", "B", "A", "C", "B", "A", "D"]
VALUES = [0.30, 0.10, 0.20, 0.40, 0.15, 0.31, np.nan]


def test_compositions_are_counted_and_structures_near_their_best_go_along() -> None:
    assert go_on(VALUES, NAMES, 2, within=0.105) == [1, 4, 2, 0]
    assert go_on(VALUES, NAMES, 2, within=0.0) == [1, 2]
    assert go_on(VALUES, NAMES, 9, within=1.0) == [1, 4, 2, 0, 5, 3, 6]
    assert go_on([], [], 3, within=0.1) == []
    assert go_on([0.1, 0.1], ["A", "B"], 1, within=0.1) == [0]


def test_where_compositions_are_few_their_next_best_structures_fill_up() -> None:
    assert go_on(VALUES, NAMES, 6, within=0.0) == [1, 2, 3, 6, 4, 0]
    assert go_on([np.nan, 0.1, 0.9], ["A", "A", "A"], 2, within=0.0) == [1, 2]


def test_structures_of_few_compositions_do_not_crowd_out_the_others() -> None:
    rng = np.random.default_rng(0)
    names = [f"X{i // 20}" for i in range(10_000)]
    true = np.repeat(rng.normal(0, 0.3, 500), 20) + rng.uniform(0, 0.1, 10_000)
    wanted = best_of_compositions(true, names, 50)
    passed = passed_looks(lambda rows, *_: true[list(rows)], names, 50)
    assert set(wanted) <= set(passed)
    assert len(passed) < 1_000


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

    def __call__(self, rows: Sequence[int], look: Look) -> NDArray[np.float64]:
        self.asked.append((len(rows), look.members, look.volumes.n_scales))
        return self.seen[list(rows)]


def test_what_the_full_filter_would_choose_passes_and_little_else() -> None:
    n, budget = 10_000, 50
    names, energies = [f"X{i // 2}" for i in range(n)], Noisy(n, 0.01)
    expected = best_of_compositions(energies.true, names, budget)
    assert len({names[i] for i in expected}) == len(expected) == budget
    passed = passed_looks(energies, names, budget)
    assert set(expected) <= set(passed)
    assert len({names[i] for i in passed}) == THIRD_LOOK.kept * budget
    assert [asked[1:] for asked in energies.asked] == [(look.members, 1) for look in LOOKS]
    assert energies.asked[0][0] == n
    for look, (asked, *_) in zip((FIRST_LOOK, SECOND_LOOK), energies.asked[1:], strict=True):
        assert look.kept * budget <= asked <= 2 * look.kept * budget
    assert passed_looks(energies, names, budget, looks=()) == list(range(n))


def test_what_looks_do_not_see_is_lost() -> None:
    energies, names = Noisy(2000, 1.0), [f"X{i}" for i in range(2000)]
    assert len(set(passed_looks(energies, names, 20)) & set(best_of_compositions(energies.true, names, 20))) < 15


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [({"members": 0}, "1 or more"), ({"kept": 0.5}, "1 or more"), ({"over_members": "mean"}, "median or lowest")],
)
def test_what_is_no_look_is_refused(wrong: dict[str, Any], advice: str) -> None:
    with pytest.raises(InvalidInput, match=f"expected {advice}"):
        Look(**{**vars(FIRST_LOOK), **wrong})


def test_a_look_by_few_goes_by_the_most_hopeful_of_them() -> None:
    untrained = [StructuralNetwork(StructuralSettings(width=8, steps=1)) for _ in range(4)]
    ensemble = StructuralEnsemble(untrained, {"method": "test", "sha256": "0" * 64, "elements": [11, 17, 29, 79]})
    crystals = [l1_2("Cu", "Au"), l1_0("Cu", "Au")]
    energies = ensemble.member_energies(crystals, (0.9, 1.1))
    first, third = looking(ensemble, replace(FIRST_LOOK, members=3)), looking(ensemble, THIRD_LOOK)
    np.testing.assert_array_equal(first.member_energies(crystals, (0.9, 1.1)), energies[:3].min(axis=0, keepdims=True))
    np.testing.assert_array_equal(third.member_energies(crystals, (0.9, 1.1)), energies)
    assert (first.method, first.model_id, first.elements) == (ensemble.method, ensemble.model_id, ensemble.elements)
    assert first.calibration is None


def test_a_structure_that_few_members_put_below_another_of_its_composition_loses_no_choice() -> None:
    names = [f"X{i // 2}" for i in range(400)]
    true = np.arange(400) / 200 - 1.0  # of X0 the first is the best
    few, (first, second) = true.copy(), (0, 1)
    few[first] += 0.15
    assert few[second] < few[first] - 0.1

    def energies(rows: Sequence[int], look: Look) -> NDArray[np.float64]:
        return (few if look.over_members == "lowest" else true)[list(rows)]

    assert first in passed_looks(energies, names, 5)
    assert first not in passed_looks(energies, names, 5, looks=[replace(look, within=0.1) for look in LOOKS])


def test_one_stray_member_loses_no_choice() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 0.3, 4000)
    members = true + rng.normal(0, 0.01, (10, 4000))
    best = int(np.argmin(true))
    members[0, best] += 1.5

    def energies(rows: Sequence[int], look: Look) -> NDArray[np.float64]:
        over = np.min if look.over_members == "lowest" else np.median
        return np.asarray(over(members[: look.members][:, list(rows)], axis=0))

    names = [f"X{i}" for i in range(4000)]
    assert best in passed_looks(energies, names, 20)
    assert best not in passed_looks(energies, names, 20, looks=[replace(FIRST_LOOK, over_members="median")])
