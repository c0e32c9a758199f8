"""Moved atoms, and the network that tells where they came from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_networks import small_network
from torch import Tensor

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import COVALENT_RADIUS
from gnome.errors import InvalidInput
from gnome.graphs.crystal_graph import GraphBatch, PackedGraphs
from gnome.models.angular_network import AngularNetwork, AngularSettings
from gnome.models.deformation import deformed, denoising_error
from gnome.models.training import Labelled, TrainSettings, fit, predict

SHAPE = AngularSettings(width=16, steps=2, cutoff=4.0, n_radial=12, channels=3, n_relative=8, denoises=True)
TRAIN = TrainSettings(epochs=40, batch_size=8, learning_rate=5e-3, position_jitter=0.1, denoising=1.0)


def crystals(n: int) -> list[Crystal]:
    """Cubic cells of two elements in the rock salt structure: what their atoms are moved from is plain to see."""
    places = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]) / 2
    elements = [(11 + i % 2, 8 + i % 3) for i in range(n)]
    return [Crystal(np.eye(3) * (4.4 + 0.05 * i), np.repeat(pair, 4), places) for i, pair in enumerate(elements)]


def batch_of(*given: Crystal) -> GraphBatch:
    batch = PackedGraphs.from_crystals(given, SHAPE.cutoff).batch(torch.arange(len(given)))
    return replace(batch, vectors=batch.vectors.double())


def network() -> AngularNetwork:
    torch.manual_seed(0)
    made = AngularNetwork(SHAPE)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.double().eval()


def moves_of(subject: AngularNetwork, batch: GraphBatch) -> Tensor:
    with torch.inference_mode():
        return subject.denoise(batch)[1]


def test_found_moves_turn_with_the_crystal_and_energies_are_the_networks() -> None:
    subject = network()
    batch, _ = deformed(batch_of(*crystals(2)), TRAIN)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    turned = replace(batch, vectors=batch.vectors @ rotation.T)
    found = moves_of(subject, batch)
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(moves_of(subject, turned), found @ rotation.T, rtol=0, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(subject.denoise(batch)[0], subject(batch))


def test_deformations_are_as_large_as_asked_for_and_moves_are_told() -> None:
    batch = batch_of(*crystals(30))
    torch.manual_seed(0)
    moved, moves = deformed(batch, TrainSettings(position_jitter=0.2))
    assert moves is not None
    assert float(moves.std()) == pytest.approx(0.2, rel=0.1)
    torch.testing.assert_close(moved.vectors, batch.vectors + moves[batch.receivers] - moves[batch.senders])
    strained, none = deformed(batch, TrainSettings(strain_jitter=0.02))
    assert none is None
    stretch = (strained.vectors - batch.vectors).norm(dim=1) / batch.distances
    assert 0.01 < float(stretch.mean()) < 0.05


def test_the_error_leaves_out_common_moves_and_padding() -> None:
    batch = batch_of(*crystals(3))
    moves = torch.randn(len(batch.atomic_numbers), 3, dtype=torch.float64)
    shift = torch.tensor([[0.5, -1, 2], [3, 0, 0], [0, 0, 9]], dtype=torch.float64)[batch.node_graph]
    means = torch.stack([moves[batch.node_graph == i].mean(0) for i in range(3)])[batch.node_graph]
    assert float(denoising_error(moves - means, moves + shift, batch, 3)) == pytest.approx(0, abs=1e-12)
    wrong = torch.where(batch.node_graph[:, None] == 2, 7.0, moves - means)
    assert float(denoising_error(wrong, moves, batch, 2)) == pytest.approx(0, abs=1e-12)
    assert float(denoising_error(wrong, moves, batch, 3)) > 1
    assert float(denoising_error(torch.zeros_like(moves), moves, batch, 3)) == pytest.approx(1)


def test_denoising_is_learnt_beside_energies() -> None:
    given = crystals(24)
    data = Labelled(PackedGraphs.from_crystals(given, SHAPE.cutoff), torch.tensor([i % 2 - i % 3 / 2 for i in range(24)]))
    torch.manual_seed(0)
    subject = AngularNetwork(SHAPE)
    before = (predict(subject, data.inputs) - data.targets).abs().mean()
    fit(subject, data, data, TRAIN)
    assert (predict(subject, data.inputs) - data.targets).abs().mean() < 0.3 * before
    batch, moves = deformed(data.inputs.batch(torch.arange(24)), TRAIN)
    assert moves is not None
    assert float(denoising_error(moves_of(subject, batch), moves, batch, 24)) < 0.6


def test_the_weight_of_moves_counts() -> None:
    """What asks for moves alone learns them further than what hardly asks."""
    given = crystals(24)
    data = Labelled(PackedGraphs.from_crystals(given, SHAPE.cutoff), torch.zeros(24))
    errors = []
    for weight in (1e-6, 1.0):
        torch.manual_seed(0)
        subject = AngularNetwork(SHAPE)
        fit(subject, data, data, replace(TRAIN, denoising=weight))
        torch.manual_seed(1)
        batch, moves = deformed(data.inputs.batch(torch.arange(24)), TRAIN)
        assert moves is not None
        errors.append(float(denoising_error(moves_of(subject, batch), moves, batch, 24)))
    assert errors[1] < 0.8 * errors[0]


def test_radii_are_learnt_by_a_network_for_itself() -> None:
    given = crystals(8)
    data = Labelled(PackedGraphs.from_crystals(given, SHAPE.cutoff), torch.linspace(-1, 1, 8))
    subject, other = AngularNetwork(SHAPE), AngularNetwork(SHAPE)
    fit(subject, data, data, replace(TRAIN, epochs=2))
    for untouched in (other, AngularNetwork(SHAPE)):
        assert untouched.radii is not None
        assert untouched.radii.tolist() == pytest.approx([1.0, *(COVALENT_RADIUS[z] for z in range(1, len(untouched.radii)))])
    assert subject.radii is not None
    assert not torch.equal(subject.radii, untouched.radii)


def test_relative_lengths_count() -> None:
    plain, subject = batch_of(*crystals(1)), network()
    with torch.inference_mode():
        before = subject(plain)
        assert subject.radii is not None
        subject.radii.data[8] *= 1.2
        assert abs(float(subject(plain) - before)) > 1e-4


def test_what_cannot_denoise_says_so(labelled: Labelled) -> None:
    with pytest.raises(InvalidInput, match="set denoises and position_jitter"):
        fit(small_network(), labelled, labelled, TRAIN)
    subject, batch = AngularNetwork(replace(SHAPE, denoises=False)), batch_of(*crystals(1))
    with pytest.raises(InvalidInput, match="denoises is off"):
        subject.denoise(batch)
    with pytest.raises(InvalidInput, match="n_relative is 1"):
        AngularSettings(n_relative=1)
