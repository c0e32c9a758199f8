"""The edge block of a graph network in fused kernels, BF16 and FP8, against the block out of PyG and torch parts.

    python benchmarks/fp8_edge_block.py             # one GPU, under two minutes: table, errors, kernels, settings
    python benchmarks/fp8_edge_block.py --toy       # plain torch code on the CPU: shows that it runs

Goals, at width 256, 1e6 edges sorted by receiver, 17 edges a node: fused BF16 >= 3x the unfused block (eager, and compiled),
FP8 >= 1.3x fused BF16, saved activations of FP8 0.5x.  Where time should go, ns an edge at width 256 on an H200 (4.1 TB/s of
HBM and 788 TFLOP/s in BF16 measured, FP8 1.8x that assumed), by `predictions`; what nodes hold is taken to stay in the L2 cache,
but for half of the senders' rows, which are two times as large as it:

                       BF16: HBM  tensor      FP8: HBM  tensor
    hidden                   0.31  0.17            0.31  0.09
    output                   0.37  0.17            0.31  0.09
    received                 0.12  -               0.12  -
    hidden again             0.44  0.17            0.25  0.09
    norm gradient            0.37  0.17            0.25  0.09
    hidden gradient          0.37  0.17            0.19  0.09
    edge gradient            0.37  0.17            0.31  0.09
    weight gradients         0.50  0.33            0.25  0.33
    sums of d_hidden         0.25  -               0.12  -

3.1 ms forward and backward in BF16, 2.2 ms in FP8.  A kernel far above both of its columns waits: for rows that it asked for too
late, or for one of its own phases, since a multiprocessor holds only one or two programs.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_timing import conditions, print_table, time_in_turns, write_row
from torch import Tensor, nn
from torch_geometric.utils import scatter

from gnome.fp8.edge_block import EdgeBlock, EdgeOrder, EdgeSettings, Precision, TileSettings

HBM, BF16_FLOPS, FP8_FLOPS = 4.1e12, 788e12, 1.8 * 788e12
EDGES_PER_NODE = 17
LIMITS = {"bf16": 0.02, "fp8": 0.08}
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")

TILES = {
    256: (TileSettings(warps=8), TileSettings(warps=16)),
    128: (TileSettings(warps=8, programs=2), TileSettings(warps=16), TileSettings(warps=8)),
}
"""Settings to try, by width; those left out keep part of their numbers outside the registers."""

KERNELS = {
    "hidden": "edge_hidden_kernel",
    "output": "edge_output_kernel",
    "norm_gradient": "edge_norm_gradient_kernel",
    "hidden_gradient": "edge_hidden_gradient_kernel",
    "edge_gradient": "edge_gradient_kernel",
}
"""Settings by name, and the kernel each is of."""


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
    new_edges, received = graph.run(block if call is None else call)
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
    exact = make_block(width, "bf16", EdgeSettings.of(width), "cuda").double()
    exact._has_kernels = lambda _: False  # type: ignore[method-assign]
    doubled = {name: getattr(graph, name).detach().double() for name in ("nodes", "edges")}
    expected = all_results(exact, replace(graph, **{name: x.requires_grad_() for name, x in doubled.items()}))
    rows, worst = [], {}
    for precision in PRECISIONS:
        found = all_results(make_block(width, precision, settings[precision], "cuda"), graph)
        graph.nodes.grad = graph.edges.grad = None
        errors = {name: float((found[name].double() - x).norm() / x.norm()) for name, x in expected.items()}
        worst[precision] = errors
        rows.append((precision, *errors.values()))
        write_row("fp8_edge_block_errors", width=width, n_edges=n_edges, precision=precision, **errors)
    print(f"\nrelative errors against FP64, width {width}, {n_edges} edges")
    print_table(("precision", *expected), rows)
    for precision, errors in worst.items():
        wrong = {name: error for name, error in errors.items() if not error < LIMITS[precision]}  # NaN is wrong too
        if wrong:
            print(f"WRONG: {precision} is off by {wrong}, expected below {LIMITS[precision]}")


def launches(graph: Graph, block: EdgeBlock) -> tuple[Callable[[EdgeSettings], Any], Callable[[EdgeSettings], Any]]:
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

    def forward(settings: EdgeSettings) -> tuple[Tensor, ...]:
        return edge_launch.forward(edges, ends, parameters, graph.order, block.eps, fp8, settings)

    kept = forward(block.settings)
    saved = (kept[2], kept[3]) if fp8 else (edges, kept[3])

    def backward(settings: EdgeSettings) -> tuple[Tensor, ...]:
        gradients = (graph.grad_edges, graph.grad_received)
        return edge_launch.backward(gradients, saved, ends, parameters, graph.order, block.eps, fp8, settings)

    return forward, backward


def label(tiles: TileSettings) -> str:
    return f"{tiles.block} edges, {tiles.warps} warps, {tiles.programs} programs"


def time_of(kernel: str, *times: dict[str, float]) -> float:
    return sum(spent for own in times for name, spent in own.items() if kernel in name)


def sweep(n_edges: int, width: int, precision: Precision) -> EdgeSettings:
    """Give all kernels one setting after another, print what each kernel takes, and return the fastest of each."""
    graph = random_graph(n_edges, width, "cuda")
    forward, backward = launches(graph, make_block(width, precision, EdgeSettings.of(width), "cuda"))
    rows, measured = [], []
    for tiles in TILES[width]:
        settings = EdgeSettings(**dict.fromkeys(KERNELS, tiles))
        try:
            times = [device_times(lambda run=run, settings=settings: run(settings)) for run in (forward, backward)]
        except Exception as error:  # a setting that does not fit is a row of the table
            rows.append((f"{label(tiles)}: {type(error).__name__} {str(error)[:60]}", *[float("inf")] * len(KERNELS)))
            continue
        own = {name: time_of(kernel, *times) for name, kernel in KERNELS.items()}
        measured.append((tiles, own))
        rows.append((label(tiles), *own.values()))
        write_row("fp8_edge_block_settings", width=width, n_edges=n_edges, precision=precision, setting=label(tiles), ms=own)
    print(f"\nsettings, {precision}, width {width}, {n_edges} edges; ms (hidden: both directions)")
    print_table(("setting", *KERNELS), rows)
    return EdgeSettings(**{name: min(measured, key=lambda pair, name=name: pair[1][name])[0] for name in KERNELS})


def predictions(n_edges: int, d: int, precision: Precision) -> dict[str, tuple[float, float, float]]:
    """HBM bytes, FLOP and the tensor cores' rate of each kernel."""
    s, rate = (1, FP8_FLOPS) if precision == "fp8" else (2, BF16_FLOPS)
    gathered = d  # half of the senders' rows
    per_edge = {
        "hidden": (2 * d + (d if s == 1 else 0) + s * d + gathered, 2 * d * d, rate),
        "output": (s * d + 4 * d, 2 * d * d, rate),
        "received": (2 * d, 0, rate),
        "hidden again": (3 * s * d + gathered, 2 * d * d, rate),
        "norm gradient": (2 * s * d + 2 * d, 2 * d * d, rate),
        "hidden gradient": (3 * s * d, 2 * d * d, rate),
        "edge gradient": (s * d + 4 * d, 2 * d * d, rate),
        "weight gradients": (4 * s * d, 4 * d * d, BF16_FLOPS),
        "sums of d_hidden": (2 * s * d, 0, rate),
    }
    return {name: (n_edges * hbm, n_edges * flop, r) for name, (hbm, flop, r) in per_edge.items()}


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
    first, second = device_times(lambda: forward(settings)), device_times(lambda: backward(settings))
    named = {
        "hidden": time_of("edge_hidden_kernel", first),
        "output": time_of("edge_output_kernel", first),
        "received": time_of("segment_sum_kernel", first),
        "hidden again": time_of("edge_hidden_kernel", second),
        "norm gradient": time_of("edge_norm_gradient_kernel", second),
        "hidden gradient": time_of("edge_hidden_gradient_kernel", second),
        "edge gradient": time_of("edge_gradient_kernel", second),
        "weight gradients": time_of("weight_gradient_kernel", second),
        "sums of d_hidden": time_of("segment_sum_kernel", second),
    }
    rows = []
    for name, (hbm, flop, rate) in predictions(n_edges, width, precision).items():
        ms = named[name]
        limits = (hbm / HBM * 1e3, flop / rate * 1e3)
        rows.append((name, *limits, ms, ms / max(limits), flop / ms / 1e9 if ms else 0.0, hbm / ms / 1e6 if ms else 0.0))
        write_row(
            "fp8_edge_block_kernels", width=width, n_edges=n_edges, precision=precision, kernel=name, ms=ms, limits_ms=limits
        )
    others = sum(first.values()) + sum(second.values()) - sum(named.values())
    rows.append(("all others", 0.0, 0.0, others, 0.0, 0.0, 0.0))
    print(f"\nkernels, {precision}, width {width}, {n_edges} edges")
    print_table(("kernel", "HBM ms", "tensor ms", "measured ms", "x limit", "TFLOP/s", "HBM GB/s"), rows)


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
    timings = time_in_turns(arms, warm_up=4, samples=12)
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
    blocks |= {name: make_block(64, name, EdgeSettings.of(64), "cpu") for name in ("bf16", "fp8")}
    for name, block in blocks.items():
        step(graph, block)
        start = time.perf_counter()
        step(graph, block)
        rows.append((name, (time.perf_counter() - start) * 1e3, saved_bytes(graph, block) / 2000))
    print_table(("plain torch code", "ms", "saved bytes an edge"), rows)
    for precision in PRECISIONS:
        rows = [(name, a / HBM * 1e3, c / rate * 1e3) for name, (a, c, rate) in predictions(10**6, 256, precision).items()]
        rows.append(("sum of the larger", sum(max(row[1:]) for row in rows), 0.0))
        print(f"\npredicted, {precision}, width 256, 1e6 edges")
        print_table(("kernel", "HBM ms", "tensor ms"), rows)


def table(shapes: list[tuple[int, int]], settings: dict[int, dict[Precision, EdgeSettings]], deadline: float) -> None:
    """Print forward and backward of all arms for each (width, edges)."""
    rows = [row for width, n_edges in shapes for row in compare(n_edges, width, settings[width], deadline)]
    print("\nforward and backward")
    header = ("width", "edges", "arm", "ms", "ns/edge", "x unfused", "x fused bf16", "saved B/edge", "peak GiB")
    print_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--toy", action="store_true", help="plain torch code on the CPU")
    parser.add_argument("--seconds", type=float, default=60, help="after this, no more is compiled by torch, nor swept")
    given = parser.parse_args()
    if given.toy:
        toy()
        return
    deadline = time.monotonic() + given.seconds
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
    print(conditions())
    default = {width: dict.fromkeys(PRECISIONS, EdgeSettings.of(width)) for width in (256, 128)}
    table([(256, 10**6), (256, 10**5), (256, 4 * 10**6), (128, 10**6)], default, deadline)
    for width in (256, 128):
        check(width, 20_003, default[width])
    for precision in PRECISIONS:
        kernels(10**6, 256, precision, default[256][precision])
    for width in (256, 128):
        if time.monotonic() > deadline:
            break
        best: dict[Precision, EdgeSettings] = {precision: sweep(10**6, width, precision) for precision in ("fp8", "bf16")}
        print(best)
        check(width, 20_003, best)
        table([(width, 10**6)], {width: best}, 0.0)


if __name__ == "__main__":
    main()
