"""The network whose edges see angles: against sums over triples of atoms, its symmetries, and batches of one shape."""

from copy import deepcopy
from dataclasses import fields

import numpy as np
import pytest
import torch
from numpy.polynomial.legendre import Legendre
from small_networks import other_descriptions
from torch import nn

from gnome.crystals.crystal import Crystal
from gnome.fp8.edge_block import EdgeOrder
from gnome.graphs.crystal_graph import GraphBatch, PackedGraphs
from gnome.graphs.harmonics import spherical_harmonics
from gnome.models.angular_network import AVERAGE_COORDINATION, AngularChannel, AngularNetwork, AngularSettings, edge_order
from gnome.models.structural import StructuralNetwork, StructuralSettings
from gnome.models.training import Labelled, Run, TrainSettings, _Trainer

SMALL = AngularSettings(width=16, steps=2, cutoff=4.0, n_radial=12, channels=3)


def crystal(seed: int = 0, n_atoms: int = 4) -> Crystal:
    rng = np.random.default_rng(seed)
    lattice = np.diag(rng.uniform(3.5, 5.5, 3)) + rng.uniform(-0.5, 0.5, (3, 3))
    return Crystal(lattice, rng.integers(1, 90, n_atoms), rng.uniform(0, 1, (n_atoms, 3)))


def network(settings: AngularSettings = SMALL) -> AngularNetwork:
    """A network whose every part counts: what begins at zero is moved away from it."""
    torch.manual_seed(0)
    made = AngularNetwork(settings)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.double().eval()


def batch_of(*crystals: Crystal) -> GraphBatch:
    batch = PackedGraphs.from_crystals(crystals, SMALL.cutoff).batch(torch.arange(len(crystals)))
    return GraphBatch(**{**vars(batch), "vectors": batch.vectors.double()})


def energies(subject: nn.Module, *crystals: Crystal) -> torch.Tensor:
    with torch.inference_mode():
        return subject(batch_of(*crystals))


def test_a_channel_sums_over_the_angles_to_all_edges_of_an_atom() -> None:
    torch.manual_seed(0)
    batch = batch_of(crystal(1, 3))
    channel = AngularChannel(8, 2, 3).double()
    nn.init.normal_(channel.read.weight)
    edges = torch.randn(len(batch.senders), 8, dtype=torch.float64)
    directions = batch.vectors / batch.distances[:, None]
    with torch.inference_mode():
        found = channel(edges, spherical_harmonics(directions, 3), batch, edge_order(batch).receiver_offsets)
        weights = channel.weigh(edges).numpy()
    cosines = (directions @ directions.T).numpy()
    same_end = (batch.receivers[:, None] == batch.receivers[None, :]).numpy()
    seen = [np.where(same_end, Legendre.basis(order)(cosines), 0) @ weights / AVERAGE_COORDINATION for order in (1, 2, 3)]
    with torch.inference_mode():
        read = channel.norm(torch.from_numpy(np.concatenate(seen, 1)))
        expected = channel.read(torch.cat([read, read[batch.reverse]], 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # vectors are kept in FP32


def test_energy_does_not_depend_on_how_the_crystal_is_described() -> None:
    subject, original = network(), crystal()
    same = other_descriptions(original)
    values = energies(subject, original, *same)
    torch.testing.assert_close(values, values[0].expand_as(values), rtol=0, atol=1e-5)
    torch.testing.assert_close(values, torch.cat([energies(subject, one) for one in (original, *same)]), rtol=0, atol=1e-9)
    assert abs(float(energies(subject, crystal(5))[0] - values[0])) > 1e-3


def test_angles_tell_apart_what_distances_do_not() -> None:
    """An atom between two others, straight and bent, far from all images: the same bonds, and no bond between the outer two."""

    def chain(angle: float) -> Crystal:
        positions = 3.0 * np.array([[0, 0, 0], [1, 0, 0], [np.cos(angle), np.sin(angle), 0]]) + 12
        return Crystal(np.eye(3) * 24, np.array([22, 8, 8]), positions / 24)

    straight, bent = chain(np.pi), chain(2.0)
    blind = network(AngularSettings(**{**vars(SMALL), "channels": 0}))
    assert abs(float(energies(blind, straight) - energies(blind, bent))) < 1e-5
    assert abs(float(energies(network(), straight) - energies(network(), bent))) > 1e-3


def test_an_edge_fades_out_at_the_cutoff() -> None:
    subject, batch = network(), batch_of(crystal())
    nearly = torch.full_like(batch.distances, SMALL.cutoff - 1e-3)
    assert float(subject.radial(nearly, batch).max()) < 1e-6
    assert float(subject.radial(nearly - 1.0, batch).max()) > 0.05


def test_an_atom_learns_of_all_atoms_of_its_crystal_and_of_no_other() -> None:
    """Also of those that no edge joins it to: the mean over the crystal counts."""
    subject, batch = network().node_updates[0], batch_of(crystal(0, 4), crystal(1, 3))
    torch.manual_seed(0)
    nodes, received = torch.randn(2, 7, 16, dtype=torch.float64)
    changed = nodes.clone()
    changed[0, ::2] += 1.0  # the norm over features would hide a shift of all of them
    with torch.inference_mode():
        moved = (subject(changed, received, batch) - subject(nodes, received, batch)).abs().amax(1)
    assert bool((moved[:4] > 1e-3).all())
    assert float(moved[4:].max()) < 1e-12


def test_orders_need_no_sorting() -> None:
    batch = batch_of(crystal(0, 3), crystal(1, 2))
    found, expected = edge_order(batch), EdgeOrder.of(batch.senders, batch.receivers, len(batch.atomic_numbers))
    assert expected.receiver_order is found.receiver_order is None
    assert torch.equal(found.receiver_offsets, expected.receiver_offsets)
    assert torch.equal(found.sender_offsets, expected.sender_offsets)
    assert torch.equal(batch.senders[found.sender_order.long()], batch.senders[expected.sender_order.long()])
    assert torch.equal(found.sender_order.sort().values, torch.arange(len(batch.senders)).int())


@pytest.mark.parametrize("kind", ["gnome", "angular"])
def test_a_step_on_a_batch_of_fixed_shape_is_the_step(kind: str) -> None:
    torch.manual_seed(0)
    made: nn.Module = AngularNetwork(SMALL) if kind == "angular" else StructuralNetwork(StructuralSettings(width=16, cutoff=4.0))
    pack = PackedGraphs.from_crystals([crystal(seed, 1 + seed % 4) for seed in range(12)], 4.0)
    train = Labelled(pack, torch.randn(12))
    settings = TrainSettings(epochs=1, batch_size=6, volume_jitter=0.1)
    found = []
    for fixed in (False, True):
        trainer = _Trainer(Run(network=deepcopy(made), train=train, validation=train, settings=settings), compile_network=False)
        trainer.fixed = pack.fixed(6)
        rows = torch.tensor([3, 11, 0, 7, 2, 5])
        assert trainer.fixed.fits(rows) == [True]
        errors = trainer._step(rows, torch.linspace(0.9, 1.1, 6), fixed=fixed)
        found.append([errors, *(parameter.grad for parameter in trainer.network.parameters())])
    assert any(gradient.abs().max() > 1e-2 for gradient in found[0][1:])
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-6)


def test_settings_are_kept_whole() -> None:
    assert set(AngularNetwork(SMALL).config()) == {field.name for field in fields(AngularSettings)}
