"""The edge block: plain torch code against FP64, and the kernels, interpreted, against the plain code."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gnome.fp8 import edge_block
from gnome.fp8.edge_block import EdgeBlock, EdgeOrder, EdgeSettings, TileSettings

WIDTH = 64
Graph = tuple[Tensor, Tensor, Tensor, Tensor]


def graph(n_nodes: int, n_edges: int, width: int = WIDTH, *, in_order: bool = True, seed: int = 0) -> Graph:
    generator = torch.Generator().manual_seed(seed)
    senders = torch.randint(n_nodes, (n_edges,), generator=generator)
    receivers = torch.randint(max(1, n_nodes - 2), (n_edges,), generator=generator)  # the last two nodes receive nothing
    receivers = receivers.sort().values if in_order else receivers
    nodes = torch.randn(n_nodes, width, generator=generator)
    edges = torch.randn(n_edges, width, generator=generator).bfloat16().float()
    return nodes, edges, senders, receivers


def block(width: int = WIDTH, precision: edge_block.Precision = "bf16", settings: EdgeSettings | None = None) -> EdgeBlock:
    torch.manual_seed(1)
    made = EdgeBlock(width, precision, settings=settings)
    torch.nn.init.normal_(made.norm_weight, 1.0, 0.2)
    torch.nn.init.normal_(made.norm_bias, 0.0, 0.2)
    return made


def concatenated(made: EdgeBlock, nodes: Tensor, edges: Tensor, senders: Tensor, receivers: Tensor) -> tuple[Tensor, Tensor]:
    """The block as its definition reads: one linear layer of the concatenation, one node at a time for the sums."""
    weight = torch.cat([made.weight_sender, made.weight_receiver, made.weight_edge], 1)
    hidden = torch.cat([nodes[senders], nodes[receivers], edges], 1) @ weight.T + made.bias_hidden
    out = (hidden * torch.sigmoid(hidden)) @ made.weight_out.T + made.bias_out
    centred = out - out.mean(1, keepdim=True)
    unit = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + made.eps)
    new_edges = edges + unit * made.norm_weight + made.norm_bias
    received = [new_edges[receivers == node].sum(0) for node in range(nodes.shape[0])]
    return new_edges, torch.stack(received)


def everything(
    forward: Callable[..., tuple[Tensor, Tensor]], made: EdgeBlock, given: Graph, dtype: torch.dtype, common: float = 0.0
) -> dict[str, Tensor]:
    """Results and all gradients of a fixed weighting of the results, with a mean of `common`."""
    nodes, edges, senders, receivers = given
    nodes, edges = (x.detach().to(dtype).requires_grad_() for x in (nodes, edges))
    made.zero_grad()
    new_edges, received = forward(nodes, edges, senders, receivers)
    generator = torch.Generator().manual_seed(9)
    weighting = [(torch.randn(x.shape, generator=generator) + common).to(x) for x in (new_edges, received)]
    ((new_edges * weighting[0]).sum() + (received * weighting[1]).sum()).backward()
    gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
    found = {"new_edges": new_edges, "received": received, "nodes": nodes.grad, "edges": edges.grad, **gradients}
    return {name: torch.zeros(()) if x is None else x.detach().double() for name, x in found.items()}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 errors."""
    return {name: float((found[name] - x).norm() / x.norm().clamp(min=1e-30)) for name, x in expected.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    worst = errors(found, expected)
    assert max(worst.values()) < limit, worst


@pytest.mark.parametrize("n_edges", [0, 1, 50])
@pytest.mark.parametrize("in_order", [True, False])
def test_torch_code_is_the_definition(n_edges: int, in_order: bool) -> None:
    made, given = block().double(), graph(7, n_edges, in_order=in_order)
    expected = everything(lambda *x: concatenated(made, *x), made, given, torch.float64)
    assert_close(everything(made, made, given, torch.float64), expected, 1e-12)


def test_torch_code_differentiates() -> None:
    made = block(4).double()
    nodes, edges, senders, receivers = graph(3, 6, 4)
    nodes, edges = nodes.double().requires_grad_(), edges.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda n, e: made(n, e, senders, receivers), (nodes, edges))


def test_fp8_in_torch_code_keeps_25_db() -> None:
    given = graph(9, 120)
    exact, rounded = (everything(made, made, given, torch.float32) for made in (block(), block(precision="fp8")))
    worst = errors(rounded, exact)
    assert worst["new_edges"] > 1e-3
    assert max(worst.values()) < 10 ** (-25 / 20), worst


@pytest.fixture
def kernels(interpreted_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send CPU tensors to the kernels.

    Two more things of the interpreter are mended: it counts with arrays of one, which NumPy 2.4 refuses, and multiplies BF16
    matrices by their bits, as integers.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(matrix: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if matrix.dtype.scalar != tl.bfloat16:
            return matrix
        return interpreter.TensorHandle((matrix.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(edge_block, "use_kernels", lambda _: True)


def settings(tiles: TileSettings = TileSettings(block=16, warps=1)) -> EdgeSettings:  # noqa: B008 - frozen
    return EdgeSettings(hidden=tiles, output=tiles, norm_gradient=tiles, hidden_gradient=tiles, edge_gradient=tiles)


def compare(made: EdgeBlock, given: Graph, limit: float, common: float = 0.0) -> dict[str, Tensor]:
    """Check the kernels against plain torch code in FP64 of the same rounded inputs; returns what the kernels found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edge_block, "use_kernels", lambda _: False)
        patch.setattr(made, "precision", "bf16")
        expected = everything(made, made, given, torch.float32, common)
    found = everything(made, made, given, torch.bfloat16, common)
    assert_close(found, expected, limit)
    return found


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("n_edges", [1, 16, 100])
@pytest.mark.parametrize("in_order", [True, False])
def test_kernels_compute_the_block(n_edges: int, in_order: bool) -> None:
    """Four programs: 100 edges are seven tiles, so that some take one more than others."""
    compare(block(settings=settings()), graph(11, n_edges, in_order=in_order), 0.02)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("tiles", [TileSettings(), TileSettings(block=32, warps=2, programs=2, ahead=False)])
def test_kernels_with_other_settings(tiles: TileSettings, precision: edge_block.Precision) -> None:
    limit = 0.02 if precision == "bf16" else 10 ** (-24 / 20)
    compare(block(precision=precision, settings=settings(tiles)), graph(5, 100), limit)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_differentiates(used: int) -> None:
    made, (nodes, edges, senders, receivers) = block(settings=settings()), graph(5, 20)
    gradients = []
    for kernels in (True, False):
        edges = edges.detach().bfloat16() if kernels else edges.detach().float()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(edge_block, "use_kernels", lambda _, kernels=kernels: kernels)
            result = made(nodes, edges.requires_grad_(), senders, receivers)[used]
        gradients.append(torch.autograd.grad(result.float().square().sum(), edges)[0].float())
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 0.02


@pytest.mark.usefixtures("kernels")
def test_kernels_in_fp8_keep_24_db() -> None:
    compare(block(precision="fp8", settings=settings()), graph(11, 70, in_order=False), 10 ** (-24 / 20))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_gradients_that_all_point_one_way_are_as_good(precision: edge_block.Precision) -> None:
    """A loss that pulls all features alike has a gradient whose rows are nearly their mean, of which the norm passes nothing on."""
    made = block(precision=precision, settings=settings())
    torch.nn.init.ones_(made.norm_weight)  # else the norm's scale alone makes features differ
    compare(made, graph(11, 70), 0.04 if precision == "bf16" else 0.09, common=4.0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("width", [128, 256])
def test_kernels_at_other_widths(precision: edge_block.Precision, width: int) -> None:
    limit = 0.02 if precision == "bf16" else 10 ** (-24 / 20)
    compare(block(width, precision, settings()), graph(5, 20, width), limit)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_kernels_without_edges(precision: edge_block.Precision) -> None:
    found = everything(*[block(precision=precision)] * 2, graph(4, 0), torch.bfloat16)
    assert found["new_edges"].shape == (0, WIDTH)
    assert not any(bool(x.any()) for x in found.values())


@pytest.mark.usefixtures("kernels")
def test_fp8_saves_half_of_what_bf16_saves_an_edge() -> None:
    n_edges = 40
    given = graph(6, n_edges, 256)
    nodes, edges = (x.bfloat16().requires_grad_() for x in given[:2])
    saved = {}
    for precision in ("bf16", "fp8"):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: (kept.append(x), x)[1], lambda x: x):
            results = block(256, precision)(nodes, edges, *given[2:])
        saved[precision] = sum(x.nbytes for x in kept if x.shape[:1] == (n_edges,) and x.dtype != torch.int32)
        del results
    assert saved == {"bf16": n_edges * 512, "fp8": n_edges * (256 + 4)}


@pytest.mark.usefixtures("kernels")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_fp8_shows_an_infinity() -> None:
    nodes, edges, senders, receivers = graph(4, 20)
    edges[3, 5] = float("inf")
    new_edges, received = block(precision="fp8")(nodes, edges, senders, receivers)
    assert new_edges[3].isnan().all()
    assert new_edges[4:].isfinite().all()
    assert received[receivers[3]].isnan().all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_kernels_under_compile(precision: edge_block.Precision) -> None:
    made, given = block(precision=precision, settings=settings()), graph(5, 20)
    nodes, edges = (x.bfloat16().requires_grad_() for x in given[:2])
    order = EdgeOrder.of(*given[2:], 5)
    results = []
    for call in (made, torch.compile(made, backend="aot_eager", fullgraph=True)):
        new_edges, received = call(nodes, edges, *given[2:], order)
        gradients = torch.autograd.grad(
            new_edges.float().square().sum() + received.square().sum(), [nodes, edges, made.weight_out]
        )
        results.append((new_edges, received, *gradients))
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))


@pytest.mark.usefixtures("kernels")
def test_same_bits_twice() -> None:
    made, given = block(precision="fp8", settings=settings()), graph(5, 30, in_order=False)
    first, second = (everything(made, made, given, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_of_very_different_scale_contract_exactly(kernels: None) -> None:
    from gnome.fp8.kernels.segment_sum import weight_gradient

    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(50, 64, generator=generator) * 8 for _ in range(2))
    left, right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
    scales = [2.0 ** torch.randint(-20, 20, (50,), generator=generator).float() for _ in range(2)]
    exact = (left.double() * scales[0][:, None]).T @ (right.double() * scales[1][:, None])
    found = weight_gradient(left, right, *scales, 8)
    assert float((found - exact).norm() / exact.norm()) < 1e-5


def test_an_order_lists_edges_by_node() -> None:
    _, _, senders, receivers = graph(7, 30, in_order=False)
    order = EdgeOrder.of(senders, receivers, 7)
    assert order.receiver_order is not None
    for node in range(7):
        for index, offsets, listed in (
            (senders, order.sender_offsets, order.sender_order),
            (receivers, order.receiver_offsets, order.receiver_order),
        ):
            own = listed[offsets[node] : offsets[node + 1]]
            assert own.tolist() == torch.nonzero(index == node).flatten().tolist()
    assert EdgeOrder.of(senders, receivers.sort().values, 7).receiver_order is None


def test_settings_survive_packing() -> None:
    settings = EdgeSettings(hidden=TileSettings(block=128), edge_gradient=TileSettings(warps=8, programs=2, ahead=False))
    assert EdgeSettings.unpacked(settings.packed()) == settings


def test_what_does_not_fit_is_refused() -> None:
    nodes, edges, senders, receivers = graph(4, 10)
    with pytest.raises(ValueError, match="width 32"):
        block(32)(nodes, edges, senders, receivers)
    with pytest.raises(ValueError, match="10 edges have senders"):
        block()(nodes, edges, senders[:3], receivers)
    with pytest.raises(ValueError, match="the order is of 10 edges and 9 nodes"):
        block()(nodes, edges, senders, receivers, EdgeOrder.of(senders, receivers, 9))
    with pytest.raises(ValueError, match="expected 0 to 1"):
        EdgeOrder.of(senders, receivers, 2)
    with pytest.raises(ValueError, match="'fp32', 'bf16' or 'fp8'"):
        EdgeBlock(8, "fp64")  # type: ignore[arg-type]
