"""What each kernel of the edge block takes beside what bytes and operations would, and which launch settings suit it."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from edge_graph import Graph, make_block, random_graph
from gpu_timing import print_table, write_row
from torch import Tensor

from gnome.fp8.edge_block import EdgeBlock, EdgeSettings, Precision, TileSettings

HBM, BF16_FLOPS, FP8_FLOPS = 4.1e12, 788e12, 1.8 * 788e12

_WHOLE = (TileSettings(), TileSettings(ahead=False), TileSettings(warps=8), TileSettings(warps=8, ahead=False))
_PAIRS = (TileSettings(warps=8, programs=2), TileSettings(warps=8, programs=2, ahead=False))
TILES: dict[tuple[int, Precision], tuple[TileSettings, ...]] = {
    (256, "bf16"): _WHOLE,
    (256, "fp8"): (*_WHOLE, *_PAIRS),
    (128, "bf16"): (*_PAIRS, TileSettings(warps=8, programs=3, ahead=False)),
    (128, "fp8"): (*_PAIRS, TileSettings(warps=8, programs=3, ahead=False), TileSettings(warps=4, programs=4, ahead=False)),
}
"""Settings to try, by width and precision."""

KERNELS = {
    "hidden": "edge_hidden_kernel",
    "output": "edge_output_kernel",
    "norm_gradient": "edge_norm_gradient_kernel",
    "hidden_gradient": "edge_hidden_gradient_kernel",
    "edge_gradient": "edge_gradient_kernel",
}
"""Settings by name, and the kernel each is of."""


def launches(graph: Graph, block: EdgeBlock) -> tuple[Callable[[EdgeSettings], Any], Callable[[EdgeSettings], Any]]:
    """Return forward and backward of the kernels with settings to be tried, outside autograd."""
    from gnome.fp8.kernels import edge_launch
    from gnome.fp8.kernels.edge_weights import EdgeWeights

    fp8 = block.precision == "fp8"
    with torch.no_grad():
        ends = tuple((graph.nodes @ w.to(torch.bfloat16).T).contiguous() for w in (block.weight_sender, block.weight_receiver))
        vectors = torch.stack([block.bias_out - block.bias_out.mean(), block.norm_weight, block.norm_bias])
        parameters = (block.weight_edge.data, block.weight_out - block.weight_out.mean(0), vectors)
    edges = graph.edges.detach()

    def forward(settings: EdgeSettings) -> tuple[Tensor, ...]:
        return edge_launch.forward(edges, ends, parameters, graph.order, block.eps, fp8, settings)

    kept = forward(block.settings)
    saved = (kept[2], kept[3]) if fp8 else (edges, kept[3])
    weights = EdgeWeights(kept[4], kept[5])

    def backward(settings: EdgeSettings) -> tuple[Tensor, ...]:
        gradients = (graph.grad_edges, graph.grad_received)
        return edge_launch.backward(gradients, saved, ends, weights, vectors, graph.order, block.eps, fp8, settings)

    return forward, backward


def compile_one(job: tuple[int, Precision, TileSettings]) -> None:
    """Run the kernels once with a setting, so that they lie in Triton's cache."""
    width, precision, tiles = job
    settings = EdgeSettings(**dict.fromkeys(KERNELS, tiles))
    try:
        for run in launches(random_graph(5000, width, "cuda"), make_block(width, precision, settings, "cuda")):
            run(settings)
    except Exception as error:  # told again, as a row of the table, when it is its turn
        print(f"{job}: {type(error).__name__}")


def compile_all(widths: tuple[int, ...]) -> None:
    """Compile for all settings at the same time, a process each."""
    jobs = [(width, precision, tiles) for (width, precision), own in TILES.items() if width in widths for tiles in own]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=spawn) as pool:
        list(pool.map(compile_one, jobs))


def label(tiles: TileSettings) -> str:
    return f"{tiles.block} edges, {tiles.warps} warps, {tiles.programs} programs{', ahead' if tiles.ahead else ''}"


def time_of(kernel: str, *times: dict[str, float]) -> float:
    return sum(spent for own in times for name, spent in own.items() if kernel in name)


def sweep(n_edges: int, width: int, precision: Precision) -> EdgeSettings:
    """Give all kernels one setting after another, print what each kernel takes, and return the fastest of each."""
    graph = random_graph(n_edges, width, "cuda")
    forward, backward = launches(graph, make_block(width, precision, None, "cuda"))
    rows, measured = [], []
    for tiles in TILES[width, precision]:
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
    best = EdgeSettings(**{name: min(measured, key=lambda pair, name=name: pair[1][name])[0] for name in KERNELS})
    print("fastest:", "; ".join(f"{name}: {label(getattr(best, name))}" for name in KERNELS))
    return best


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
    rows.append(("sum", *(sum(row[i] for row in rows) for i in (1, 2, 3)), 0.0, 0.0, 0.0))
    print(f"\nkernels, {precision}, width {width}, {n_edges} edges")
    print_table(("kernel", "HBM ms", "tensor ms", "measured ms", "x limit", "TFLOP/s", "HBM GB/s"), rows)
