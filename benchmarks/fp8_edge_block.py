"""The edge block of a graph network in fused kernels, BF16 and FP8, against the block out of PyG and torch parts.

    python benchmarks/fp8_edge_block.py             # one GPU, under three minutes: table, errors, kernels
    python benchmarks/fp8_edge_block.py --sweep     # first tries launch settings, and goes on with the fastest
    python benchmarks/fp8_edge_block.py --toy       # plain torch code on the CPU: shows that it runs

Goals, at width 256, 1e6 edges sorted by receiver, 17 edges a node: fused BF16 >= 3x the unfused block (eager, and compiled),
FP8 >= 1.3x fused BF16, saved activations of FP8 0.5x.  Every arm is timed as it is called, and as a CUDA graph, in which the host has
no part; in a network of several layers the host is ahead of the device, and the second counts.

Where time should go, ns an edge at width 256 on an H200 (4.1 TB/s of
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
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from edge_graph import PRECISIONS, Call, Graph, UnfusedEdgeBlock, captured, make_block, random_graph, step, with_order
from fp8_edge_kernels import BF16_FLOPS, FP8_FLOPS, HBM, compile_all, kernels, predictions, sweep
from gpu_timing import conditions, print_table, time_in_turns, write_row
from torch import Tensor, nn

from gnome.fp8.edge_block import EdgeBlock, EdgeSettings, Precision

LIMITS = {"bf16": 0.02, "fp8": 0.08}
WIDTHS = (256, 128)

Settings = dict[Precision, EdgeSettings]


def all_results(block: EdgeBlock, graph: Graph) -> dict[str, Tensor]:
    new_edges, received = graph.run(with_order(block, graph))
    torch.autograd.backward([new_edges, received], [graph.grad_edges.to(new_edges.dtype), graph.grad_received.to(received.dtype)])
    gradients = {"nodes": graph.nodes.grad, "edges": graph.edges.grad, **{n: p.grad for n, p in block.named_parameters()}}
    return {
        "new_edges": new_edges.detach(),
        "received": received.detach(),
        **{f"d {n}": x for n, x in gradients.items() if x is not None},
    }


def check(width: int, n_edges: int, settings: Settings) -> None:
    """Print relative L2 errors of results and gradients against FP64."""
    graph = random_graph(n_edges, width, "cuda")
    exact = make_block(width, "bf16", None, "cuda").double()
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


def saved_bytes(graph: Graph, block: Call) -> int:
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


def compare(n_edges: int, width: int, settings: Settings, *, compiled: bool) -> Iterator[tuple[Any, ...]]:
    """Yield a row an arm: ms forward and backward, ratios to the unfused block and to fused BF16, saved bytes an edge, peak memory."""
    graph = random_graph(n_edges, width, "cuda")
    unfused = UnfusedEdgeBlock(width).cuda()
    blocks = {precision: make_block(width, precision, settings[precision], "cuda") for precision in PRECISIONS}
    calls: dict[str, tuple[nn.Module, Call]] = {"unfused": (unfused, unfused)}
    if compiled:
        torch._dynamo.reset()
        calls["unfused, compiled"] = (unfused, torch.compile(unfused, dynamic=False))
    calls |= {f"fused {name}": (block, with_order(block, graph)) for name, block in blocks.items()}
    arms = {name: lambda block=block, call=call: step(graph, block, call) for name, (block, call) in calls.items()}
    pool = torch.cuda.graph_pool_handle()
    for how, inner in (("as called", 1), ("CUDA graph", 3)):
        torch.cuda.empty_cache()
        timed = arms if inner == 1 else {name: captured(run, pool) for name, run in arms.items()}
        timings = time_in_turns(timed, warm_up=4, samples=12, inner=inner)
        for name, timing in timings.items():
            kept = saved_bytes(graph, calls[name][1]) / n_edges
            ratios = (timings["unfused"].median / timing.median, timings["fused bf16"].median / timing.median)
            write_row(
                "fp8_edge_block", arm=name, how=how, width=width, n_edges=n_edges, ms=timing.median,
                quartiles=[timing.low, timing.high], saved_bytes_per_edge=kept, peak=timing.peak,
                unfused_ratio=ratios[0], fused_bf16_ratio=ratios[1],
            )  # fmt: skip
            peak = timing.peak / 2**30 if inner == 1 else float("nan")  # a graph's memory is its own
            yield (width, n_edges, name, how, timing.median, timing.median * 1e6 / n_edges, *ratios, kept, peak)


def toy() -> None:
    """Time plain torch code at toy size on the CPU."""
    graph = random_graph(2000, 64, "cpu", torch.float32)
    rows = []
    blocks: dict[str, nn.Module] = {"unfused": UnfusedEdgeBlock(64)}
    blocks |= {name: make_block(64, name, None, "cpu") for name in PRECISIONS}
    for name, block in blocks.items():
        step(graph, block)
        start = time.perf_counter()
        step(graph, block)
        rows.append((name, (time.perf_counter() - start) * 1e3, saved_bytes(graph, block) / 2000))
    print_table(("plain torch code", "ms", "saved bytes an edge"), rows)
    for precision in PRECISIONS:
        rows = [(name, a / HBM * 1e3, c / rate * 1e3) for name, (a, c, rate) in predictions(10**6, 256, precision).items()]
        rows.append(("sum of the larger", sum(max(row[1:]) for row in rows), 0.0))
        print(f"\npredicted, {precision}, width 256, 1e6 edges; FP8 products at {FP8_FLOPS / BF16_FLOPS:.1f} times BF16's rate")
        print_table(("kernel", "HBM ms", "tensor ms"), rows)


def table(shapes: list[tuple[int, int]], settings: dict[int, Settings]) -> None:
    """Print forward and backward of all arms for each (width, edges)."""
    rows = [row for width, n in shapes for row in compare(n, width, settings[width], compiled=n == 10**6)]
    print("\nforward and backward")
    header = ("width", "edges", "arm", "timed", "ms", "ns/edge", "x unfused", "x fused bf16", "saved B/edge", "peak GiB")
    print_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--toy", action="store_true", help="plain torch code on the CPU")
    parser.add_argument("--sweep", action="store_true", help="try launch settings first, and use the fastest")
    given = parser.parse_args()
    if given.toy:
        toy()
        return
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
    print(conditions())
    torch.cuda.set_stream(torch.cuda.Stream())
    settings: dict[int, Settings] = {width: {p: EdgeSettings.of(width) for p in PRECISIONS} for width in WIDTHS}
    for width in WIDTHS:
        check(width, 20_003, settings[width])
    if given.sweep:
        compile_all(WIDTHS)
        settings = {width: {p: sweep(10**6, width, p) for p in PRECISIONS} for width in WIDTHS}
        for width in WIDTHS:
            check(width, 20_003, settings[width])
    table([(256, 10**6), (256, 10**5), (256, 4 * 10**6), (128, 10**6)], settings)
    for precision in PRECISIONS:
        kernels(10**6, 256, precision, settings[256][precision])


if __name__ == "__main__":
    main()
