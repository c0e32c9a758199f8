"""The edge block's kernels on a GPU: against FP64, on dirty memory, and twice."""

import copy

import pytest
import torch
from torch import Tensor

from gnome.fp8.edge_block import EdgeBlock, EdgeOrder, EdgeSettings, Precision, TileSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LIMITS = {"bf16": 0.02, "fp8": 10 ** (-22 / 20)}


def graph(n_nodes: int, n_edges: int, width: int, *, in_order: bool = True) -> tuple[Tensor, ...]:
    """Nodes and edges, BF16, senders, receivers, and gradients of the results."""
    generator = torch.Generator("cuda").manual_seed(n_edges)
    senders, receivers = (torch.randint(n_nodes, (n_edges,), generator=generator, device="cuda") for _ in range(2))
    features = [
        torch.randn(n, width, generator=generator, device="cuda").bfloat16() for n in (n_nodes, n_edges, n_edges, n_nodes)
    ]
    return *features[:2], senders, receivers.sort().values if in_order else receivers, *features[2:]


def poison(n_bytes: int = 2**30) -> None:
    """Leave NaN in the memory that will be handed out next."""
    dirty = torch.full((n_bytes // 4,), float("nan"), device="cuda")
    del dirty


def run(block: EdgeBlock, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    nodes, edges, senders, receivers, grad_edges, grad_received = given
    nodes, edges = (x.detach().requires_grad_() for x in (nodes, edges))
    order = EdgeOrder.of(senders, receivers, nodes.shape[0])
    block.zero_grad()
    poison()
    new_edges, received = block(nodes, edges, senders, receivers, order)
    poison()
    torch.autograd.backward([new_edges, received], [grad_edges.to(new_edges.dtype), grad_received.to(received.dtype)])
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    found = {
        "new_edges": new_edges.detach(),
        "received": received.detach(),
        "nodes": nodes.grad,
        "edges": edges.grad,
        **gradients,
    }
    return {name: x for name, x in found.items() if x is not None}


def make(width: int, precision: Precision, tiles: TileSettings | None = None) -> EdgeBlock:
    torch.manual_seed(0)
    names = ("hidden", "output", "norm_gradient", "hidden_gradient", "edge_gradient")
    settings = None if tiles is None else EdgeSettings(**dict.fromkeys(names, tiles))
    return EdgeBlock(width, precision, settings=settings).cuda()


def assert_right(block: EdgeBlock, given: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(block, given)
    exact = copy.deepcopy(block).double()
    exact.precision = "bf16"
    monkeypatch.setattr(exact, "_has_kernels", lambda _: False)
    expected = run(exact, (*(x.double() for x in given[:2]), *given[2:]))
    assert found.keys() == expected.keys()
    errors = {name: float((found[name].double() - x).norm() / x.norm().clamp(min=1e-30)) for name, x in expected.items()}
    assert max(errors.values()) < LIMITS[block.precision], errors


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(
    ("n_nodes", "n_edges", "in_order"), [(3, 1, True), (40, 129, False), (3000, 50_001, True), (60_000, 1_000_003, True)]
)
def test_results_and_gradients(
    precision: Precision, width: int, n_nodes: int, n_edges: int, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_right(make(width, precision), graph(n_nodes, n_edges, width, in_order=in_order), monkeypatch)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("width", "tiles"),
    [
        (256, TileSettings(warps=8)),
        (256, TileSettings(ahead=False)),
        (128, TileSettings(warps=8, programs=2)),
        (128, TileSettings(block=128, warps=8, ahead=False)),
        (64, TileSettings(warps=4, programs=4, ahead=False)),
    ],
)
def test_settings(precision: Precision, width: int, tiles: TileSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_right(make(width, precision, tiles), graph(1000, 20_003, width), monkeypatch)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_same_bits_twice(precision: Precision) -> None:
    block, given = make(256, precision), graph(6000, 100_003, 256)
    first, second = run(block, given), run(block, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_under_torch_compile(precision: Precision) -> None:
    block, given = make(128, precision), graph(300, 5003, 128)
    compiled = torch.compile(block, fullgraph=True)
    order = EdgeOrder.of(*given[2:4], 300)
    for mine, other in zip(compiled(*given[:4], order), block(*given[:4], order), strict=True):
        assert torch.allclose(mine.float(), other.float(), atol=0.05, rtol=0.02)


def test_no_edges() -> None:
    found = run(make(64, "fp8"), graph(5, 0, 64))
    assert not any(bool(found[name].any()) for name in ("received", "nodes", "weight_out"))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_what_is_not_finite_shows(precision: Precision, bad: float) -> None:
    nodes, edges, senders, receivers, *_ = graph(40, 500, 128)
    edges[3, 5] = bad
    new_edges, received = make(128, precision)(nodes, edges, senders, receivers)
    assert new_edges[3].isnan().all()
    assert received[receivers[3]].isnan().all()
    assert new_edges[4:].isfinite().all()
