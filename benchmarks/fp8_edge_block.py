"""The edge block of a graph network in fused kernels, BF16 and FP8, against the block out of PyG and torch parts.

    python benchmarks/fp8_edge_block.py             # one GPU, three minutes: errors, settings, kernels, table
    python benchmarks/fp8_edge_block.py --toy       # plain torch code on the CPU: shows that it runs

Goals, at width 256, 1e6 edges sorted by receiver, 17 edges a node: fused BF16 >= 3x the unfused block (eager, and compiled),
FP8 >= 1.3x fused BF16, saved activations of FP8 0.5x.  Where time should go, ns an edge at width 256 on an H200 (HBM 4.3 TB/s
and BF16 788 TFLOP/s measured; FP8 1.8x that and the L2 cache 5.5 TB/s assumed), by `predictions` for tiles of 64 edges:

                       BF16: HBM  tensor  L2      FP8: HBM  tensor  L2
    forward kernel           0.24  0.33   1.49          0.30  0.18   1.02
    received                 0.12  -      -             0.12  -      -
    backward kernel          0.71  0.67   3.17          0.48  0.37   2.09
    weight gradients         0.48  0.33   -             0.24  0.33   -
    sums of d_hidden         0.24  -      -             0.12  -      -

The tiles' own copies of the weights are most of the L2 column: 4 d^2 bytes a layer (BF16) for every tile.  Tiles of 128 halve
that part, and leave one program a multiprocessor; weights in shared memory (`resident`, FP8) take it away.  If the measured
time follows the L2 column, that is the next step to take; if it is the sum of the columns, nothing overlaps, and more programs
a multiprocessor are.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gpu_timing import conditions, print_table, time_in_turns, write_row
from torch import Tensor, nn
from torch_geometric.utils import scatter

from gnome.fp8.edge_block import EdgeBlock, EdgeOrder, EdgeSettings, Precision, TileSettings

HBM, L2, BF16_FLOPS, FP8_FLOPS = 4.3e12, 5.5e12, 788e12, 1.8 * 788e12
EDGES_PER_NODE = 17
LIMITS = {"bf16": 0.02, "fp8": 0.08}

TILES = (
    TileSettings(block=64, warps=4, stages=2),
    TileSettings(block=128, warps=8, stages=2),
    TileSettings(block=128, warps=8, stages=3),
    TileSettings(block=64, warps=8, stages=2),
    TileSettings(block=64, warps=4, stages=2, reduce=True),
    TileSettings(block=128, warps=8, stages=2, reduce=True),
)
FORWARD_TILES = {
    "bf16": (*TILES, TileSettings(block=128, warps=8, stages=1, feed="whole")),
    "fp8": (
        *TILES,
        TileSettings(block=128, warps=8, stages=1, feed="resident"),
        TileSettings(block=128, warps=8, stages=1, feed="resident", reduce=True),
        TileSettings(block=128, warps=8, stages=1, feed="whole"),
        TileSettings(block=64, warps=4, stages=1, feed="whole"),
    ),
}


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

    def run(self, block: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
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


def step(graph: Graph, block: nn.Module, call: Callable[..., tuple[Tensor, Tensor]] | None = None) -> None:
    """Forward and backward with all gradients."""
    new_edges, received = graph.run(call or block)
    torch.autograd.backward([new_edges, received], [graph.grad_edges.to(new_edges.dtype), graph.grad_received.to(received.dtype)])
    graph.nodes.grad = graph.edges.grad = None
    block.zero_grad(set_to_none=True)


def with_order(block: EdgeBlock, graph: Graph) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *given: block(*given, graph.order)


def make_block(width: int, precision: Precision, settings: EdgeSettings, device: str) -> EdgeBlock:
    torch.manual_seed(0)
    return EdgeBlock(width, precision, settings=settings).to(device)


def all_results(block: EdgeBlock, graph: Graph) -> dict[str, Tensor]:
    new_edges, received = graph.run(with_order(block, graph))
    torch.autograd.backward([new_edges, received], [graph.grad_edges.to(new_edges.dtype), graph.grad_received.to(received.dtype)])
    gradients = {"nodes": graph.nodes.grad, "edges": graph.edges.grad, **{n: p.grad for n, p in block.named_parameters()}}
    return {
        "new_edges": new_edges.detach(),
        "received": received.detach(),
        **{f"d {n}": x for n, x in gradients.items() if x is not None},
    }


def check(width: int, n_edges: int, settings: dict[Precision, EdgeSettings]) -> None:
    """Print relative L2 errors of results and gradients against FP64."""
    graph = random_graph(n_edges, width, "cuda")
    exact = make_block(width, "bf16", EdgeSettings(), "cuda").double()
    exact._has_kernels = lambda _: False  # type: ignore[method-assign]
    doubled = {name: getattr(graph, name).detach().double() for name in ("nodes", "edges")}
    expected = all_results(exact, replace(graph, **{name: x.requires_grad_() for name, x in doubled.items()}))
    rows, worst = [], {}
    for precision in ("bf16", "fp8"):
        found = all_results(make_block(width, precision, settings[precision], "cuda"), graph)
        graph.nodes.grad = graph.edges.grad = None
        errors = {name: float((found[name].double() - x).norm() / x.norm()) for name, x in expected.items()}
        worst[precision] = max(errors.values())
        rows.append((precision, *errors.values()))
        write_row("fp8_edge_block_errors", width=width, n_edges=n_edges, precision=precision, **errors)
    print(f"\nrelative errors against FP64, width {width}, {n_edges} edges")
    print_table(("precision", *expected), rows)
    for precision, error in worst.items():
        if not error < LIMITS[precision]:
            print(f"WRONG: {precision} is off by {error:.3g}, expected below {LIMITS[precision]}")


def launches(graph: Graph, block: EdgeBlock) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return forward and backward of the kernels with settings to be tried, outside autograd."""
    from gnome.fp8.kernels import edge_launch

    fp8 = block.precision == "fp8"
    with torch.no_grad():
        ends = tuple((graph.nodes @ w.to(torch.bfloat16).T).contiguous() for w in (block.weight_sender, block.weight_receiver))
        parameters = (
            block.weight_edge.data,
            block.weight_out.data,
            torch.stack([block.bias_out, block.norm_weight, block.norm_bias]),
        )
    edges = graph.edges.detach()

    def forward(tiles: TileSettings) -> tuple[Tensor, ...]:
        return edge_launch.forward(edges, ends, parameters, graph.order, block.eps, fp8, tiles)

    kept = forward(block.settings.forward)
    saved = (kept[2], kept[3]) if fp8 else (edges, kept[3])

    def backward(tiles: TileSettings, cublas: bool = False) -> tuple[Tensor, ...]:
        gradients = (graph.grad_edges, graph.grad_received)
        return edge_launch.backward(
            gradients, saved, ends, parameters, graph.order, block.eps, fp8, EdgeSettings(backward=tiles, cublas=cublas)
        )

    return forward, backward


def label(tiles: TileSettings) -> str:
    where = "in the tile" if tiles.reduce else "after"
    return f"{tiles.feed} {tiles.block} edges, {tiles.warps} warps, {tiles.stages} stages, sums {where}"


def sweep(n_edges: int, width: int, precision: Precision, deadline: float) -> EdgeSettings:
    """Time every setting of both passes, print them sorted, and return the fastest."""
    graph = random_graph(n_edges, width, "cuda")
    block = make_block(width, precision, EdgeSettings(), "cuda")
    passes = zip(("forward", "backward"), launches(graph, block), (FORWARD_TILES[precision], TILES), strict=True)
    best = {}
    for name, launch, candidates in passes:
        rows: list[tuple[str, float]] = []
        timed: list[tuple[float, TileSettings]] = []
        for tiles in candidates:
            if time.monotonic() > deadline and timed:
                rows.append((label(tiles) + ": no time left", float("inf")))
                continue
            try:
                spent = time_in_turns({name: lambda tiles=tiles, launch=launch: launch(tiles)}, warm_up=3, samples=8)[name].median
            except Exception as error:  # a setting that does not fit is a row of the table
                rows.append((f"{label(tiles)}: {type(error).__name__} {str(error)[:60]}", float("inf")))
                continue
            rows.append((label(tiles), spent))
            timed.append((spent, tiles))
            write_row(
                "fp8_edge_block_settings",
                width=width,
                n_edges=n_edges,
                precision=precision,
                arm=name,
                setting=label(tiles),
                ms=spent,
            )
        print(f"\n{name}, {precision}, width {width}, {n_edges} edges")
        print_table(("setting", "ms"), sorted(rows, key=lambda row: row[1]))
        best[name] = min(timed, key=lambda pair: pair[0], default=(0.0, TileSettings()))[1]
    arms = {"cublas" if cublas else "split": partial(launch, best["backward"], cublas) for cublas in (False, True)}
    timings = time_in_turns(arms, warm_up=3, samples=8)
    print_table(("weights' gradients", "whole backward ms"), [(name, timing.median) for name, timing in timings.items()])
    cublas = precision == "bf16" and timings["cublas"].median < timings["split"].median
    return EdgeSettings(forward=best["forward"], backward=best["backward"], cublas=cublas)


def predictions(
    n_edges: int, d: int, precision: Precision, settings: EdgeSettings
) -> dict[str, tuple[float, float, float, float]]:
    """HBM bytes, L2 bytes, FLOP and the tensor cores' rate of each kernel; what nodes hold is taken to stay in the L2 cache."""
    s, rate = (1, FP8_FLOPS) if precision == "fp8" else (2, BF16_FLOPS)
    first, second = settings.forward, settings.backward
    weights = 0.0 if first.feed == "resident" else 2 * d * d * s / first.block
    staged = 3 * s * d if first.feed == "staged" else 0
    forward_hbm = 4 * d + (d if s == 1 else 0)
    backward_hbm = 4 * d + 4 * s * d
    per_edge = {
        "edge_forward": (forward_hbm, forward_hbm + weights + staged + 4 * d + 2 * d, 4 * d * d, rate),
        "received": (0 if first.reduce else 2 * d, 0, 0, rate),
        "edge_backward": (
            backward_hbm,
            backward_hbm + 4 * d * d * s / second.block + 3 * s * d + 4 * d + 4 * d + 2 * d + 4 * d + 4 * d,
            8 * d * d,
            rate,
        ),
        "weight_gradient": (4 * s * d, 0, 4 * d * d, BF16_FLOPS),
        "d_hidden sums": ((1 if second.reduce else 2) * s * d, 0, 0, rate),
    }
    return {name: (n_edges * a, n_edges * b, n_edges * c, r) for name, (a, b, c, r) in per_edge.items()}


def device_times(run: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Mean device time of each kernel a run, ms."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / 1e3 / repeats for e in recorded.key_averages() if e.self_device_time_total > 0}


def kernels(n_edges: int, width: int, precision: Precision, settings: EdgeSettings) -> None:
    """Print each kernel's time beside what bytes and operations would take."""
    graph = random_graph(n_edges, width, "cuda")
    forward, backward = launches(graph, make_block(width, precision, settings, "cuda"))
    found = [device_times(lambda: forward(settings.forward)), device_times(lambda: backward(settings.backward, False))]
    named = {
        "edge_forward": (found[0], "edge_forward_kernel"),
        "received": (found[0], "segment_sum_kernel"),
        "edge_backward": (found[1], "edge_backward_kernel"),
        "weight_gradient": (found[1], "weight_gradient_kernel"),
        "d_hidden sums": (found[1], "segment_sum_kernel"),
    }
    rows = []
    for name, (hbm, l2, flop, rate) in predictions(n_edges, width, precision, settings).items():
        times, key = named[name]
        ms = sum(spent for kernel, spent in times.items() if key in kernel)
        limits = (hbm / HBM * 1e3, flop / rate * 1e3, l2 / L2 * 1e3)
        rates = (flop / ms / 1e9, hbm / ms / 1e6) if ms else (0.0, 0.0)
        rows.append((name, *limits, ms, *rates))
        write_row(
            "fp8_edge_block_kernels", width=width, n_edges=n_edges, precision=precision, kernel=name, ms=ms, limits_ms=limits
        )
    others = sum(sum(times.values()) for times in found) - sum(row[4] for row in rows)
    print(f"\nkernels, {precision}, width {width}, {n_edges} edges; all others {others:.3f} ms")
    print_table(("kernel", "HBM ms", "tensor ms", "L2 ms", "measured ms", "TFLOP/s", "HBM GB/s"), rows)


def saved_bytes(graph: Graph, block: Callable[..., tuple[Tensor, Tensor]]) -> int:
    """Bytes of the per-edge tensors that backward keeps; each memory counted once, indices not."""
    kept: dict[int, int] = {}
    n_edges = graph.edges.shape[0]

    def pack(x: Tensor) -> Tensor:
        if x.shape[:1] == (n_edges,) and x.dtype not in (torch.int32, torch.int64):
            kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = graph.run(block)
    del results
    return sum(kept.values())


def compare(n_edges: int, width: int, settings: dict[Precision, EdgeSettings], deadline: float) -> Iterator[tuple[Any, ...]]:
    """Yield a row an arm: ms forward and backward, ratio to the unfused block, saved bytes an edge, peak memory."""
    graph = random_graph(n_edges, width, "cuda")
    unfused = UnfusedEdgeBlock(width).cuda()
    blocks = {precision: make_block(width, precision, settings[precision], "cuda") for precision in ("bf16", "fp8")}
    calls: dict[str, tuple[nn.Module, Callable[..., tuple[Tensor, Tensor]]]] = {"unfused": (unfused, unfused)}
    calls |= {f"fused {name}": (block, with_order(block, graph)) for name, block in blocks.items()}
    if time.monotonic() < deadline:
        torch._dynamo.reset()
        calls["unfused compiled"] = (unfused, torch.compile(unfused, dynamic=False))
    arms = {name: lambda block=block, call=call: step(graph, block, call) for name, (block, call) in calls.items()}
    timings = time_in_turns(arms, warm_up=4, samples=15)
    for name, timing in timings.items():
        kept = saved_bytes(graph, calls[name][1]) / n_edges
        ratios = (timings["unfused"].median / timing.median, timings["fused bf16"].median / timing.median)
        write_row(
            "fp8_edge_block", arm=name, width=width, n_edges=n_edges, ms=timing.median, quartiles=[timing.low, timing.high],
            saved_bytes_per_edge=kept, peak=timing.peak, unfused_ratio=ratios[0], fused_bf16_ratio=ratios[1],
        )  # fmt: skip
        yield (width, n_edges, name, timing.median, timing.median * 1e6 / n_edges, *ratios, kept, timing.peak / 2**30)


def toy() -> None:
    """Time plain torch code at toy size on the CPU."""
    graph = random_graph(2000, 64, "cpu", torch.float32)
    rows = []
    blocks: dict[str, nn.Module] = {"unfused": UnfusedEdgeBlock(64)}
    blocks |= {name: make_block(64, name, EdgeSettings(), "cpu") for name in ("bf16", "fp8")}
    for name, block in blocks.items():
        step(graph, block)
        start = time.perf_counter()
        step(graph, block)
        rows.append((name, (time.perf_counter() - start) * 1e3, saved_bytes(graph, block) / 2000))
    print_table(("plain torch code", "ms", "saved bytes an edge"), rows)
    for precision in ("bf16", "fp8"):
        rows = [
            (name, *(x * 1e3 for x in (a / HBM, c / rate, b / L2)))
            for name, (a, b, c, rate) in predictions(10**6, 256, precision, EdgeSettings()).items()
        ]
        print(f"\npredicted, {precision}, width 256, 1e6 edges")
        print_table(("kernel", "HBM ms", "tensor ms", "L2 ms"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--toy", action="store_true", help="plain torch code on the CPU")
    parser.add_argument("--seconds", type=float, default=170, help="after this, settings and compilations are left out")
    given = parser.parse_args()
    if given.toy:
        toy()
        return
    start = time.monotonic()
    print(conditions())
    default: dict[Precision, EdgeSettings] = {"bf16": EdgeSettings(), "fp8": EdgeSettings()}
    for width in (256, 128):
        check(width, 20_003, default)
    best: dict[int, dict[Precision, EdgeSettings]] = {
        width: {p: sweep(10**6, width, p, start + share * given.seconds) for p in ("bf16", "fp8")}
        for width, share in ((256, 0.4), (128, 0.5))
    }
    check(256, 20_003, best[256])
    for precision in ("bf16", "fp8"):
        kernels(10**6, 256, precision, best[256][precision])
    rows = list(
        itertools.chain.from_iterable(
            compare(n_edges, width, best[width], start + 0.85 * given.seconds)
            for n_edges, width in itertools.product((10**6, 10**5, 4 * 10**6), (256, 128))
        )
    )
    print("\nforward and backward")
    header = ("width", "edges", "arm", "ms", "ns/edge", "x unfused", "x fused bf16", "saved B/edge", "peak GiB")
    print_table(header, rows)


if __name__ == "__main__":
    main()
