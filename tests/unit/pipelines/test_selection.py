import numpy as np
import pytest

from gnome.crystals.crystal import Crystal
from pipelines.candidate import Candidate, Lineage
from pipelines.screening import Prediction
from pipelines.selection import GreedyAcquisition, RandomAcquisition, SelectionSettings, StabilityAcquisition, select
from pipelines.standing import FORMULA_THRESHOLD, P_STABLE_THRESHOLD, Doubt


@pytest.fixture
def pool():
    """Thirty candidates, three structures of each of ten compositions, with predictions from -0.2 to 0.3 eV/atom."""
    energies = np.random.default_rng(0).permutation(np.linspace(-0.2, 0.3, 30))
    candidates, predictions = [], []
    for i, energy in enumerate(energies):
        crystal = Crystal((4 + 0.1 * (i // 10)) * np.eye(3), [11 + i % 10, 35], [[0, 0, 0], [0.5, 0.5, 0.5]])
        candidates.append(Candidate(crystal=crystal, lineage=Lineage(generator="by_hand", parent_id=None)))
        predictions.append(
            Prediction(
                candidate_id=candidates[-1].id,
                e_form_per_atom=-1.0,
                spread=0.0,
                volume_scale=1.0,
                model_id="m",
                method="x",
                decomposition_energy=float(energy),
            )
        )
    return predictions, candidates


def test_best_of_each_composition_by_rank(pool):
    predictions, candidates = pool
    chosen = select(predictions, candidates, 6)
    best = {}
    for prediction, candidate in zip(predictions, candidates, strict=True):
        formula = candidate.crystal.reduced_formula
        best[formula] = min(best.get(formula, np.inf), prediction.decomposition_energy)
    assert [s.prediction.decomposition_energy for s in chosen] == sorted(best.values())[:6]
    assert len({s.candidate.crystal.reduced_formula for s in chosen}) == 6
    assert [s.rank for s in chosen] == list(range(6))
    assert all(s.candidate.id == s.prediction.candidate_id for s in chosen)


def test_budget_is_filled_beyond_the_threshold_and_says_so(pool):
    predictions, candidates = pool
    chosen = select(predictions, candidates, 10, SelectionSettings(threshold=-0.1))
    assert len(chosen) == 10
    passed = [s.below_threshold for s in chosen]
    assert 0 < sum(passed) < 10
    assert passed == sorted(passed, reverse=True)
    assert all(s.below_threshold == (s.prediction.decomposition_energy <= -0.1) for s in chosen)


@pytest.mark.parametrize("settings", [SelectionSettings(), SelectionSettings(acquisition=RandomAcquisition(seed=4))])
def test_order_of_the_arguments_does_not_matter(pool, settings):
    predictions, candidates = pool
    chosen = select(predictions, candidates, 7, settings)
    assert select(predictions[::-1], candidates[::-1], 7, settings) == chosen


def test_ties_go_by_id(pool):
    _, candidates = pool
    tied = [
        Prediction(
            candidate_id=candidate.id,
            e_form_per_atom=0.0,
            spread=0.0,
            volume_scale=1.0,
            model_id="m",
            method="x",
            decomposition_energy=0.0,
        )
        for candidate in candidates[:10]
    ]
    assert [s.candidate.id for s in select(tied, candidates, 10)] == sorted(c.id for c in candidates[:10])


def test_edges(pool):
    predictions, candidates = pool
    assert select(predictions, candidates, 0) == []
    assert select([], candidates, 5) == []
    everything = select(predictions, candidates, 100)
    assert len(everything) == len(predictions) == 30, "next best structures of the ten compositions fill the budget"
    assert len({one.candidate.crystal.reduced_formula for one in everything[:10]}) == 10
    with pytest.raises(KeyError):
        select(predictions, candidates[:3], 30)


def prediction(candidate, energy, **changes):
    fields = {"e_form_per_atom": 0.0, "spread": 0.0, "volume_scale": 1.0, "model_id": "m", "method": "x", "n_competing": 2}
    return Prediction(candidate_id=candidate.id, decomposition_energy=energy, **{**fields, **changes})


def test_the_surest_go_first_and_those_without_a_probability_last(pool):
    _, candidates = pool
    said = [(-0.20, 0.7), (-0.05, 0.99), (-0.10, None), (0.04, 0.1), (-0.30, 0.7)]
    predictions = [prediction(c, energy, p_stable=p) for c, (energy, p) in zip(candidates, said, strict=False)]
    chosen = select(predictions, candidates, 5)
    assert [predictions.index(one.prediction) for one in chosen] == [1, 4, 0, 2, 3], (
        "what is improbable goes after what nobody knows"
    )
    greedy = select(predictions, candidates, 5, SelectionSettings(acquisition=GreedyAcquisition()))
    assert [predictions.index(one.prediction) for one in greedy] == [4, 0, 2, 1, 3]


@pytest.mark.parametrize("acquisition", [StabilityAcquisition(), GreedyAcquisition()])
def test_what_is_in_doubt_goes_last_in_every_order(pool, acquisition):
    _, candidates = pool
    unbalanced = Candidate(
        crystal=candidates[3].crystal,
        lineage=Lineage(generator="by_hand", parent_id=None, parameters={"charge_balanced": False}),
    )
    candidates = [*candidates[:3], unbalanced, *candidates[4:5]]
    predictions = [
        prediction(candidates[0], -3.0, p_stable=1.0, n_competing=0),
        prediction(candidates[1], -2.0, p_stable=0.9, formula_check=FORMULA_THRESHOLD - 0.01),
        prediction(candidates[2], 0.03, p_stable=0.6, formula_check=FORMULA_THRESHOLD),
        prediction(unbalanced, -1.0, p_stable=0.8),
        prediction(candidates[4], -4.0, p_stable=P_STABLE_THRESHOLD - 0.01),
    ]
    chosen = select(predictions, candidates, 5, SelectionSettings(acquisition=acquisition))
    assert chosen[0].prediction is predictions[2]
    assert {predictions.index(one.prediction): list(one.doubts) for one in chosen} == {
        2: [],
        0: [Doubt.ELEMENTS_ONLY],
        1: [Doubt.FORMULA],
        3: [Doubt.CHARGES],
        4: [Doubt.ENSEMBLE],
    }


def test_what_failed_before_is_not_chosen_again(pool):
    _, candidates = pool
    predictions = [prediction(c, -0.2 + 0.01 * i, p_stable=0.9) for i, c in enumerate(candidates)]
    first = select(predictions, candidates, 1)[0].candidate
    again = select(predictions, candidates, len(candidates), failed=[first.crystal.scaled(1.002)])
    assert first.id not in {one.candidate.id for one in again}
    assert len(again) == len(select(predictions, candidates, len(candidates))) - 1


def test_no_crystal_is_chosen_twice_though_it_comes_from_two_places(pool):
    _, candidates = pool
    first = candidates[0]
    again = Candidate(crystal=first.crystal.scaled(1.001), lineage=Lineage(generator="another", parent_id=None))
    chosen = select([prediction(first, -0.1), prediction(again, -0.2)], [first, again], 5)
    assert [one.candidate.id for one in chosen] == [again.id]


def test_random_baseline_is_seeded_and_takes_any_candidate(pool):
    predictions, candidates = pool
    draws = [
        select(predictions, candidates, 10, SelectionSettings(acquisition=RandomAcquisition(seed=seed))) for seed in range(200)
    ]
    assert draws[0] == select(predictions, candidates, 10, SelectionSettings(acquisition=RandomAcquisition(seed=0)))
    taken = [s.prediction.decomposition_energy for chosen in draws for s in chosen]
    assert np.mean(taken) == pytest.approx(0.05, abs=0.02)  # the mean of the pool
    assert {s.candidate.id for chosen in draws for s in chosen} == {c.id for c in candidates}
    firsts = [chosen[0].below_threshold for chosen in draws]
    assert 0.3 < np.mean(firsts) < 0.7  # half of the pool passes, and the threshold decides nothing
