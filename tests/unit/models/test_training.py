"""The training loop: it learns, repeats itself, and resumes exactly."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from small_networks import small_network
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gnome.crystals.crystal import Crystal
from gnome.errors import InvalidCheckpoint, InvalidInput, TrainingDiverged
from gnome.graphs.crystal_graph import GraphBatch, PackedGraphs
from gnome.models.angular_network import AngularNetwork, AngularSettings
from gnome.models.training import Labelled, TrainSettings, epoch_batches, fit, predict

SETTINGS = TrainSettings(
    epochs=6,
    batch_size=16,
    learning_rate=3e-3,
    seed=1,
    volume_jitter=0.05,
    position_jitter=0.03,
    strain_jitter=0.02,
    save_every=2,
)


def weights_equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_epochs_visit_every_example_once_in_an_order_of_their_own() -> None:
    first, again, other = (torch.cat(list(epoch_batches(10, 4, 3, epoch))) for epoch in (0, 0, 1))
    assert sorted(first.tolist()) == list(range(10))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("precision", "min_features"), [("fp32", 0), ("bf16", 0), ("fp8", 0), ("fp8", 1024)])
def test_training_learns(labelled: Labelled, precision: str, min_features: int) -> None:
    network = small_network()
    before = (predict(network, labelled.inputs) - labelled.targets).abs().mean()
    history = fit(network, labelled, labelled, replace(SETTINGS, epochs=25, precision=precision, fp8_min_features=min_features))
    after = (predict(network, labelled.inputs) - labelled.targets).abs().mean()
    assert after < 0.5 * before
    assert len(history) == 25
    assert all(later.learning_rate < earlier.learning_rate for earlier, later in pairwise(history))


@pytest.mark.parametrize("kind", ["angular", "gnome"])
def test_no_sum_of_gradients_races_on_several_threads(labelled: Labelled, kind: str) -> None:
    """Gradients of plain indexing are added in whichever order threads come, on a CPU; those of index_select in one."""
    shape = AngularSettings(width=16, steps=2, cutoff=4.0, n_radial=8, channels=2)
    network = AngularNetwork(shape) if kind == "angular" else small_network()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        fit(network, labelled, labelled, replace(SETTINGS, epochs=1, position_jitter=0.0, strain_jitter=0.0))
    names = {event.key for event in profiled.key_averages()}
    assert "aten::index_select" in names
    assert "aten::_index_put_impl_" not in names


def test_the_same_seed_gives_the_same_weights_and_another_does_not(labelled: Labelled) -> None:
    one, two, three = small_network(), small_network(), small_network()
    fit(one, labelled, labelled, SETTINGS)
    fit(two, labelled, labelled, SETTINGS)
    fit(three, labelled, labelled, replace(SETTINGS, seed=2))
    assert weights_equal(one, two)
    assert not weights_equal(one, three)


class Stop(Exception):
    """Stands for a kill."""


def test_a_broken_run_resumes_to_the_same_weights(labelled: Labelled, tmp_path: Path) -> None:
    unbroken = small_network()
    history = fit(unbroken, labelled, labelled, SETTINGS)

    def stop_after_third(record: object) -> None:
        if record.epoch == 3:  # type: ignore[attr-defined]
            raise Stop

    resumed = small_network()
    with pytest.raises(Stop):
        fit(resumed, labelled, labelled, SETTINGS, state_path=tmp_path / "state.pt", on_epoch=stop_after_third)
    resumed = small_network()
    again = fit(resumed, labelled, labelled, SETTINGS, state_path=tmp_path / "state.pt")
    assert weights_equal(unbroken, resumed)
    assert again == history


def test_averaged_weights_go_with_the_statistics_of_norms(labelled: Labelled) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = small_network(), nn.BatchNorm1d(1)

        def forward(self, batch: GraphBatch) -> torch.Tensor:
            return self.norm(self.inner(batch)[:, None])[:, 0]

    network = Normed()
    fit(network, labelled, labelled, replace(SETTINGS, ema_decay=0.9))
    assert int(network.norm.num_batches_tracked) > 0
    assert abs(float(network.norm.running_mean)) > 0.1


def test_the_best_validation_epoch_wins(labelled: Labelled) -> None:
    """Of a validation set that wants the opposite of what is learnt an early epoch is the best."""
    network = small_network()
    opposite = Labelled(labelled.inputs, -labelled.targets)
    history = fit(network, labelled, opposite, replace(SETTINGS, learning_rate=0.03))
    reached = float((predict(network, opposite.inputs) - opposite.targets).abs().mean())
    errors = [record.validation_mae for record in history]
    assert errors.index(min(errors)) < len(errors) - 1
    assert reached == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"volume_jitter": 1.0},
        {"strain_jitter": -0.1},
        {"learning_rate": 0.0},
        {"warm_up": 1.0},
        {"gradient_clip": float("nan")},
    ],
)
def test_settings_that_no_training_can_follow_are_refused(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(InvalidInput, match=f"{name} {value}.*expected"):
        TrainSettings(**wrong)


def test_a_rate_rises_and_falls_to_nothing(labelled: Labelled) -> None:
    history = fit(small_network(), labelled, labelled, replace(SETTINGS, epochs=10, warm_up=0.4))
    rates = [record.learning_rate for record in history]
    assert rates[0] < rates[1] < rates[2]
    assert max(rates) <= SETTINGS.learning_rate
    assert rates[-1] < 0.1 * SETTINGS.learning_rate


def largest_changes(labelled: Labelled, settings: TrainSettings) -> tuple[float, float]:
    """How far an epoch moves any weight of a matrix, and any of a bias or norm, relative to 1 or to what it was."""
    network, before = small_network(), small_network()
    fit(network, labelled, labelled, settings)
    pairs = zip(network.state_dict().values(), before.state_dict().values(), strict=True)
    moved = [(old.ndim > 1, float((new - old).abs().max() / old.abs().max().clamp(min=1))) for new, old in pairs]
    return max(far for is_matrix, far in moved if is_matrix), max(far for is_matrix, far in moved if not is_matrix)


PLAIN = TrainSettings(epochs=1, batch_size=16, learning_rate=1e-3, weight_decay=0.0)


def test_gradients_are_clipped(labelled: Labelled) -> None:
    """Clipped to less than what Adam adds to a gradient's size (1e-8), they move next to nothing."""
    assert min(largest_changes(labelled, PLAIN)) > 1e-3
    assert max(largest_changes(labelled, replace(PLAIN, gradient_clip=1e-13))) < 1e-6


def test_matrices_decay_and_biases_and_norms_do_not(labelled: Labelled) -> None:
    decayed = replace(PLAIN, weight_decay=300.0, gradient_clip=1e-13)
    matrices, others = largest_changes(labelled, decayed)
    assert matrices > 0.1
    assert others < 1e-6


def test_volumes_are_varied_in_training_and_not_in_validation() -> None:
    lengths: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_network()

        def forward(self, batch: GraphBatch) -> torch.Tensor:
            lengths[self.training].append(batch.distances.detach())
            return self.inner(batch)

    single = Labelled(
        PackedGraphs.from_crystals([Crystal(np.eye(3) * 3.0, np.array([29]), np.zeros((1, 3)))], 4.0), torch.zeros(1)
    )
    fit(Watched(), single, single, replace(PLAIN, epochs=60, volume_jitter=0.1))
    exact = lengths[False][0]
    assert all(torch.equal(exact, seen) for seen in lengths[False])
    factors = torch.stack([(seen / exact) ** 3 for seen in lengths[True]])
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert 0.9 <= float(factors.min()) < 0.93
    assert 1.07 < float(factors.max()) <= 1.1


def test_training_that_diverges_says_so(labelled: Labelled) -> None:
    with pytest.raises(TrainingDiverged, match=r"learning rate of 1e\+30; lower it"):
        fit(small_network(), labelled, labelled, TrainSettings(epochs=2, batch_size=16, learning_rate=1e30))


def test_a_state_of_another_run_or_a_damaged_one_is_refused(labelled: Labelled, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    fit(small_network(), labelled, labelled, SETTINGS, state_path=path)
    with pytest.raises(InvalidCheckpoint, match="other settings"):
        fit(small_network(), labelled, labelled, replace(SETTINGS, seed=5), state_path=path)
    with pytest.raises(InvalidCheckpoint, match="or data"):
        fit(small_network(seed=9), labelled, labelled, SETTINGS, state_path=path)
    others = replace(labelled, targets=labelled.targets + 1.0)
    with pytest.raises(InvalidCheckpoint, match="or data"):
        fit(small_network(), others, labelled, SETTINGS, state_path=path)
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)
    state["best_weights"].popitem()
    torch.save(state, path)
    with pytest.raises(InvalidCheckpoint, match="cannot be resumed"):
        fit(small_network(), labelled, labelled, SETTINGS, state_path=path)
    path.write_bytes(whole[:1000])
    with pytest.raises(InvalidCheckpoint, match="cannot be resumed"):
        fit(small_network(), labelled, labelled, SETTINGS, state_path=path)
    path.write_bytes(whole)
    with ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    flipped = bytearray(whole)
    flipped[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(InvalidCheckpoint, match="is damaged"):
        fit(small_network(), labelled, labelled, SETTINGS, state_path=path)
