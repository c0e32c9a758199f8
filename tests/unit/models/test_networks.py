"""Both networks: their symmetries, the split linear layer against the concatenation, and a plain reference."""

import numpy as np
import torch
from small_networks import other_descriptions

from gnome.crystals.crystal import Crystal
from gnome.graphs.crystal_graph import GraphBatch, PackedGraphs
from gnome.models.formula_graph import FormulaGraphNetwork, FormulaGraphSettings
from gnome.models.formulas import PackedFormulas
from gnome.models.graph_network import AVERAGE_EDGE_COORDINATION, GraphNetworkBlock
from gnome.models.linear import MLP, SplitLinear
from gnome.models.structural import StructuralNetwork, StructuralSettings

SETTINGS = StructuralSettings(width=16, steps=3, cutoff=4.0)


def structural() -> StructuralNetwork:
    torch.manual_seed(0)
    return StructuralNetwork(SETTINGS).double().eval()


def crystal(seed: int = 0, n_atoms: int = 4) -> Crystal:
    rng = np.random.default_rng(seed)
    lattice = np.diag(rng.uniform(3.5, 5.5, 3)) + rng.uniform(-0.5, 0.5, (3, 3))
    return Crystal(lattice, rng.integers(1, 90, n_atoms), rng.uniform(0, 1, (n_atoms, 3)))


def energies(network: StructuralNetwork, *crystals: Crystal) -> torch.Tensor:
    pack = PackedGraphs.from_crystals(crystals, SETTINGS.cutoff)
    with torch.inference_mode():
        return network(in_double(pack.batch(torch.arange(len(crystals)))))


def in_double(batch: GraphBatch) -> GraphBatch:
    return GraphBatch(**{**vars(batch), "vectors": batch.vectors.double()})


def test_structural_energy_does_not_depend_on_how_the_crystal_is_described() -> None:
    network, original = structural(), crystal()
    same = other_descriptions(original)
    values = energies(network, original, *same)
    torch.testing.assert_close(values, values[0].expand_as(values), rtol=0, atol=2e-6)
    assert abs(float(energies(network, crystal(5))[0] - values[0])) > 1e-4


def test_structural_batch_equals_singles() -> None:
    network = structural()
    crystals = [crystal(seed, n) for seed, n in ((0, 4), (1, 1), (2, 6))]
    together = energies(network, *crystals)
    torch.testing.assert_close(together, torch.cat([energies(network, one) for one in crystals]))


def test_compositional_energy_depends_on_ratios_alone() -> None:
    torch.manual_seed(0)
    network = FormulaGraphNetwork(FormulaGraphSettings(width=16, n_schemes=2)).eval()
    formulas = [{26: 2, 8: 3}, {8: 6, 26: 4}, {26: 3, 8: 4}]
    with torch.inference_mode():
        values = network(PackedFormulas.from_compositions(formulas).batch(torch.arange(3)))
        alone = network(PackedFormulas.from_compositions(formulas[2:]).batch(torch.arange(1)))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[2:], alone)
    assert abs(float(values[0] - values[2])) > 1e-5


def test_split_linear_is_the_layer_on_the_concatenation() -> None:
    torch.manual_seed(0)
    layer = SplitLinear([3, 5], 4, gain=1.0)
    a, b, rows = torch.randn(6, 3), torch.randn(2, 5), torch.tensor([0, 1, 1, 0, 0, 1])
    weight = torch.cat([part.weight for part in layer.parts], dim=1)
    expected = torch.cat([a, b[rows]], dim=1) @ weight.T + layer.parts[0].bias
    torch.testing.assert_close(layer([a, b], [None, rows]), expected)
    torch.testing.assert_close(weight @ weight.T, torch.eye(4), atol=1e-5, rtol=0)


def reference_mlp(mlp: MLP, x: np.ndarray) -> np.ndarray:
    """The MLP on joined inputs in NumPy, float64."""
    weight = np.concatenate([part.weight.detach().double().numpy() for part in mlp.first.parts], axis=1)
    x = x @ weight.T + mlp.first.parts[0].bias.detach().double().numpy()
    for activation, layer in zip(mlp.activations, mlp.hidden, strict=True):
        x = x / (1 + np.exp(-activation.beta.detach().double().numpy() * x))
        x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    return x


def reference_block(
    block: GraphNetworkBlock, nodes: np.ndarray, edges: np.ndarray, graph: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Algorithm 1 of Battaglia et al. on one graph, loop by loop."""
    n, e = len(nodes), len(edges)
    new_edges = np.stack(
        [reference_mlp(block.edge_mlp, np.concatenate([edges[k], nodes[i], nodes[j], graph])) for k, (i, j) in enumerate(ends)]
    )
    sent, received = np.zeros_like(nodes), np.zeros_like(nodes)
    for k, (i, j) in enumerate(ends):
        sent[i] += new_edges[k] / AVERAGE_EDGE_COORDINATION
        received[j] += new_edges[k] / AVERAGE_EDGE_COORDINATION
    new_nodes = np.stack(
        [reference_mlp(block.node_mlp, np.concatenate([nodes[i], sent[i], received[i], graph])) for i in range(n)]
    )
    pooled = new_edges.sum(0) / e if block.readout else new_edges.sum(0) / AVERAGE_EDGE_COORDINATION / n
    new_graph = reference_mlp(block.global_mlp, np.concatenate([new_nodes.mean(0), pooled, graph]))
    return new_nodes, new_edges, new_graph


def test_structural_network_equals_a_plain_reference() -> None:
    network, original = structural(), crystal(2, 3)
    for parameter in network.parameters():  # so that no initial zero hides a term
        parameter.data += 0.05 * torch.randn_like(parameter)
    batch = in_double(PackedGraphs.from_crystals([original], SETTINGS.cutoff).batch(torch.tensor([0])))
    ends = torch.stack([batch.senders, batch.receivers], 1).numpy()
    centres = network.centres.numpy()
    np.testing.assert_allclose(centres, np.linspace(0.05, SETTINGS.cutoff, SETTINGS.n_gaussians), atol=1e-6)
    gaussians = np.exp(-(((batch.distances.numpy()[:, None] - centres) / 0.5) ** 2))
    nodes = network.embed_node.weight.detach().numpy()[original.atomic_numbers]
    edges = gaussians @ network.embed_edge.weight.detach().numpy().T + network.embed_edge.bias.detach().numpy()
    graph = network.embed_global.detach().numpy()
    for block in [*network.blocks, network.readout]:
        nodes, edges, graph = reference_block(block, nodes, edges, graph, ends)
    expected = graph[0] * SETTINGS.scale + SETTINGS.shift
    assert abs(network(batch).item() - expected) < 1e-9 * max(1.0, abs(expected))
