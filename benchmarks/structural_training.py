"""How fast structural networks train on one GPU: fused edge blocks in BF16 and FP8, blocks as usually written, and a CGCNN.

    python data/prepare_training.py ../shared/data SHARDS
    python benchmarks/structural_training.py SHARDS/structures.parquet [--rows 40000] [--arms ...] [--changes cutoff=5.0] [--kernels 12]

Every arm trains whole epochs of the same crystals by `gnome.models.training.fit_together`: choosing batches, jitter and averages of
weights included, validation left out; `together` is how an ensemble's members are trained.  Unfused arms have neither the edge blocks'
kernels nor those of sums over angles.  The first epoch, in which code is compiled and CUDA graphs are captured, is not counted.  `busy` is
the part of an epoch in which any kernel runs, by torch's profiler, whose epoch is another than the one that is timed.
Goals on one H200: FP8 fused >= 1.3 times BF16 fused, and that >= 3 times BF16 unfused; busy >= 90 %.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cgcnn_like import CGCNN, CGCNNSettings
from edge_graph import UnfusedEdgeBlock
from gpu_timing import conditions, print_table, write_row
from torch import Tensor, nn

from gnome.crystals.shards import read_shard
from gnome.fp8 import EdgeOrder
from gnome.graphs.crystal_graph import PackedGraphs
from gnome.models.angular_network import AngularNetwork, AngularSettings
from gnome.models.recipes import STRUCTURE_NETWORK, varied
from gnome.models.training import Labelled, Run, TrainSettings, fit_together
from gnome.quantities import Quantity

TRAIN = TrainSettings(batch_size=512, learning_rate=1e-3, volume_jitter=0.1, precision="bf16")


class PlainEdgeBlock(UnfusedEdgeBlock):
    """The block as usually written, called as ours is."""

    def forward(
        self, nodes: Tensor, edges: Tensor, senders: Tensor, receivers: Tensor, order: EdgeOrder | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return new edges and their sums by receiver."""
        del order  # of no use here
        return super().forward(nodes, edges, senders, receivers)


def unfused(network: AngularNetwork) -> AngularNetwork:
    """Replace the edge blocks; such a network is launched kernel by kernel."""
    for i, block in enumerate(network.edge_blocks):
        network.edge_blocks[i] = PlainEdgeBlock(block.norm_weight.numel())
    network.fixed_shapes = False
    return network


@dataclass(frozen=True)
class Arm:
    """A network, how it is trained, whether it is compiled, whether sums over angles have kernels, and how many are trained together."""

    make: Callable[[], nn.Module]
    settings: TrainSettings = TRAIN
    compiled: bool = False
    kernels: bool = True
    together: int = 1


def arms(ours: AngularSettings) -> dict[str, Arm]:
    fused = partial(AngularNetwork, ours)
    averaged = replace(TRAIN, ema_decay=0.999)
    return {
        "BF16 unfused": Arm(lambda: unfused(fused()), kernels=False),
        "BF16 unfused, compiled": Arm(lambda: unfused(fused()), compiled=True, kernels=False),
        "BF16 fused": Arm(fused),
        "BF16 fused, compiled": Arm(fused, compiled=True),
        "BF16 fused, compiled, averaged": Arm(fused, averaged, compiled=True),
        "FP8 fused": Arm(fused, replace(TRAIN, precision="fp8")),
        "FP8 fused, compiled": Arm(fused, replace(TRAIN, precision="fp8"), compiled=True),
        "BF16 fused, compiled, five together": Arm(fused, compiled=True, together=5),
        "FP8 fused, compiled, five together": Arm(fused, replace(TRAIN, precision="fp8"), compiled=True, together=5),
        "CGCNN of PyG": Arm(lambda: CGCNN(CGCNNSettings(cutoff=ours.cutoff))),
    }


def busy_seconds(events: Iterable[Any]) -> float:
    """Seconds in which at least one of the profiler's kernels runs."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def measure(arm: Arm, data: Labelled, nothing: Labelled, epochs: int, n_kernels: int) -> tuple[float, float, float]:
    """Seconds of the fastest epoch, seconds in which kernels run, and the largest memory, bytes; prints the longest kernels."""
    device = data.targets.device
    settings = replace(arm.settings, epochs=epochs)
    runs = []
    for seed in range(arm.together):
        torch.manual_seed(seed)
        runs.append(Run(network=arm.make().to(device), train=data, validation=nothing, settings=replace(settings, seed=seed)))
    ends: list[float] = []
    busy: list[float] = []
    cuda = device.type == "cuda"
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if cuda else None

    def on_epoch(index: int, record: Any) -> None:
        if index:  # all keep step
            return
        if cuda:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        if profiler is not None and record.epoch == epochs - 1:
            profiler.start()
        if profiler is not None and record.epoch == epochs:
            profiler.stop()
            busy.append(busy_seconds(profiler.events()))
            for event in sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:n_kernels]:
                print(f"  {event.self_device_time_total / 1e3:9.2f} ms {event.count:6d}x  {event.key[:100]}", flush=True)

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with nullcontext() if arm.kernels else patch("gnome.graphs.angular_sums.has_kernel", lambda *_: False):
        fit_together(runs, on_epoch=on_epoch, compile_network=arm.compiled)
    seconds = min(end - start for start, end in pairwise(ends[:-1]))  # the last is profiled
    return seconds, busy[0] if busy else float("nan"), float(torch.cuda.max_memory_allocated() if cuda else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("structures", type=Path)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--epochs", type=int, default=5, help="the first is not timed, the last is profiled")
    parser.add_argument("--changes", nargs="*", default=[], metavar="WORD", help="of the network that ships, such as cutoff=5.0")
    parser.add_argument("--kernels", type=int, default=0, help="print so many of each arm's kernels, those that take longest")
    parser.add_argument("--arms", nargs="+")
    options = parser.parse_args()
    print(conditions())
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    crystals, columns, _ = read_shard(options.structures)
    crystals, labels = crystals[: options.rows], columns[Quantity.E_FORM_PER_ATOM][: options.rows]
    shape, _ = varied(STRUCTURE_NETWORK, TRAIN, options.changes)
    began = time.perf_counter()
    pack = PackedGraphs.from_crystals(crystals, shape.cutoff, device)
    print(f"graphs in {time.perf_counter() - began:.2f} s")
    data = Labelled(pack, torch.tensor(labels, dtype=torch.float32, device=device))
    nothing = Labelled(PackedGraphs.from_crystals([], 5.0, device), torch.zeros(0, device=device))
    print(f"{len(pack):,} crystals, {int(pack.edge_start[-1]):,} edges")
    found, rows = arms(shape), []
    for name in options.arms or found:
        arm = found[name]
        seconds, busy, peak = measure(arm, data, nothing, options.epochs, options.kernels)
        rate, steps = arm.together * len(pack) / seconds, arm.together * -(-len(pack) // TRAIN.batch_size)
        rows.append((name, seconds * 1e3 / steps, f"{rate:,.0f}", busy / seconds, peak / 1e9))
        write_row("structural_training", arm=name, changes=options.changes, crystals_per_second=rate, busy=busy / seconds)
        print(rows[-1], flush=True)
    print_table(("arm", "ms a step", "crystals a second", "busy", "peak GB"), rows)


if __name__ == "__main__":
    main()
