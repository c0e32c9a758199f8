"""A random graph for the edge block's benchmarks, the block as it is usually written, and a step of either."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.utils import scatter

from gnome.fp8.edge_block import EdgeBlock, EdgeOrder, EdgeSettings, Precision

EDGES_PER_NODE = 17
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")

Call = Callable[..., tuple[Tensor, Tensor]]


class UnfusedEdgeBlock(nn.Module):
    """The block as it is usually written."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.out, self.norm = nn.Linear(3 * width, width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, nodes: Tensor, edges: Tensor, senders: Tensor, receivers: Tensor) -> tuple[Tensor, Tensor]:
        """Return new edges and their sums by receiver, as autocast types them."""
        with torch.autocast(edges.device.type, torch.bfloat16):
            joined = torch.cat([nodes[senders], nodes[receivers], edges], -1)
            new_edges = edges + self.norm(self.out(torch.nn.functional.silu(self.hidden(joined))))
            return new_edges, scatter(new_edges, receivers, 0, nodes.shape[0], reduce="sum")


@dataclass(frozen=True)
class Graph:
    """Features in BF16, edges sorted by receiver, and gradients of the results."""

    nodes: Tensor
    edges: Tensor
    senders: Tensor
    receivers: Tensor
    order: EdgeOrder
    grad_edges: Tensor
    grad_received: Tensor

    def run(self, block: Call) -> tuple[Tensor, Tensor]:
        """Call a block on the features."""
        return block(self.nodes, self.edges, self.senders, self.receivers)


def random_graph(n_edges: int, width: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Graph:
    generator = torch.Generator(device).manual_seed(0)
    n_nodes = max(2, n_edges // EDGES_PER_NODE)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    senders, receivers = (torch.randint(n_nodes, (n_edges,), generator=generator, device=device) for _ in range(2))
    receivers = receivers.sort().values
    order = EdgeOrder.of(senders, receivers, n_nodes)
    ends = draw(n_nodes, width).requires_grad_(), draw(n_edges, width).requires_grad_()
    return Graph(*ends, senders, receivers, order, draw(n_edges, width), draw(n_nodes, width).float())


def step(graph: Graph, block: nn.Module, call: Call | None = None) -> None:
    """Forward and backward with all gradients."""
    new_edges, received = graph.run(block if call is None else call)
    torch.autograd.backward([new_edges, received], [graph.grad_edges.to(new_edges.dtype), graph.grad_received.to(received.dtype)])
    graph.nodes.grad = graph.edges.grad = None
    block.zero_grad(set_to_none=True)


def with_order(block: EdgeBlock, graph: Graph) -> Call:
    return lambda *given: block(*given, graph.order)


def make_block(width: int, precision: Precision, settings: EdgeSettings | None, device: str) -> EdgeBlock:
    torch.manual_seed(0)
    return EdgeBlock(width, precision, settings=settings).to(device)


def captured(run: Callable[[], Any], pool: Any = None) -> Callable[[], None]:
    """Return a replay of a CUDA graph of `run`, for which the host does nothing; graphs of one pool share their memory.

    The current stream must not be the default one: autograd's nodes of leaves stay on the stream that made them.
    """
    for _ in range(3):
        run()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded, pool=pool, stream=torch.cuda.current_stream()):
        run()
    return recorded.replay
