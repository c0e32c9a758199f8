"""Reduce gradients over all GPUs of this machine in BF16 and in FP8; time, bytes and accuracy side by side.

    python benchmarks/fp8_collectives.py --sizes 4M 64M
    python benchmarks/fp8_collectives.py --toy

Arms: NCCL's BF16 all-reduce, FP8-LM's scheme (one scale for each tensor, NCCL adds in E4M3), and all to all with an FP32 sum, with and
without the last gathering.  All arms get the same gradients, take turns in one process on each GPU, and start from the same bytes each
time.  Bytes are counted for a ring where NCCL chooses how to send; the slowest rank's time counts.  SNR is that of the result against the
float64 mean of the gradients before any rounding.  `--toy` runs small sizes on CPU processes over gloo: its times say nothing.
"""

import argparse
import datetime as dt
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gnome.fp8.collectives import TorchReduction, bytes_sent, reduce_gradients, ring_sum
from gnome.fp8.formats import BLOCK, E4M3, saturating_cast
from gnome.fp8.gradients import GradientStore
from gnome.fp8.kernels.availability import use_kernels
from gnome.fp8.layout import Layout, lay_out

ARMS = ("BF16 all-reduce", "E4M3 all-reduce", "all to all", "all to all, no gather")
COLUMNS = 512
N_TENSORS = 16
WARM_UP, TIMED = 5, 20


@dataclass(frozen=True)
class Options:
    """What all processes are told; rates in GB/s."""

    sizes: tuple[int, ...]
    toy: bool
    ranks: int
    link: float
    memory: float
    meeting: str


def gradient(rank: int, index: int, numel: int, device: torch.device, spread: float = 1.0) -> torch.Tensor:
    """Normal numbers whose rows and columns differ in size, alike on all ranks."""
    own = torch.Generator(device).manual_seed(1000 * rank + index + 1)
    shared = torch.Generator(device).manual_seed(10**6 + index)
    values = torch.randn(numel // COLUMNS, COLUMNS, generator=own, device=device) * 1e-3
    for shape in ((numel // COLUMNS, 1), (1, COLUMNS)):
        values *= torch.exp(spread * torch.randn(shape, generator=shared, device=device))
    return values.view(-1)


class Contestants:
    """The arms' gradients on one rank, and how each arm reduces them."""

    def __init__(self, rank: int, ranks: int, size: int, device: torch.device) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        self.layout = lay_out([size // N_TENSORS] * N_TENSORS, world=ranks)
        self.stores = {
            "E4M3 all-reduce": GradientStore(self.layout, device, "tensor"),
            "all to all": GradientStore(self.layout, device),
            "all to all, no gather": GradientStore(self.layout, device),
        }
        self.bf16 = torch.empty(self.layout.numel, dtype=torch.bfloat16, device=device)
        for index, numel in enumerate(self.layout.numels):
            values = gradient(rank, index, numel, device)
            self.layout.part(self.bf16, index).copy_(values)
            for store in self.stores.values():
                store.add(index, values)
        first = self.stores["all to all"]
        self.start = {
            "bf16": self.bf16.clone(),
            "tensor": self.stores["E4M3 all-reduce"].payload.clone(),
            "block": first.payload.clone(),
        }
        self.scales = {"tensor": self.stores["E4M3 all-reduce"].scale.clone(), "block": first.scale.clone()}

    def restore(self, arm: str) -> None:
        """Put the gradients back as they were before a reduction."""
        if arm == ARMS[0]:
            self.bf16.copy_(self.start["bf16"])
        else:
            store = self.stores[arm]
            store.payload.copy_(self.start[store.scaling])
            store.scale.copy_(self.scales[store.scaling])

    def reduce(self, arm: str) -> None:
        """Reduce by an arm."""
        if arm == ARMS[0]:
            dist.all_reduce(self.bf16)
            self.bf16 /= self.ranks
        else:
            reduce_gradients(self.stores[arm], mode="fp8lm" if arm == ARMS[1] else "all_to_all", gather=arm != ARMS[3])

    def sent(self, arm: str) -> int:
        """Bytes that a rank sends."""
        if arm == ARMS[0]:
            return 2 * self.bf16.nbytes * (self.ranks - 1) // self.ranks
        return bytes_sent(self.layout, self.ranks, "fp8lm" if arm == ARMS[1] else "all_to_all", gather=arm != ARMS[3])

    def touched(self, arm: str) -> int:
        """Bytes that a rank's own kernels read and write beside the transfers."""
        numel = self.layout.numel
        return {ARMS[0]: 4 * numel, ARMS[1]: 3 * numel}.get(arm, numel + numel // self.ranks)

    def value(self, arm: str, index: int) -> torch.Tensor:
        """Return a tensor after the reduction."""
        return (self.layout.part(self.bf16, index) if arm == ARMS[0] else self.stores[arm].value(index)).double()

    def accuracy(self, arms: tuple[str, ...]) -> dict[str, float]:
        """SNR in dB of each arm's result; where nothing is gathered each rank answers for its shard."""
        sums = torch.zeros(len(arms), 2, dtype=torch.float64, device=self.device)
        first, last = (block * BLOCK for block in self.layout.shard(self.rank))
        for index, (start, numel) in enumerate(zip(self.layout.starts, self.layout.numels, strict=True)):
            exact = torch.zeros(numel, dtype=torch.float64, device=self.device)
            for rank in range(self.ranks):
                exact += gradient(rank, index, numel, self.device)
            exact /= self.ranks
            own = slice(min(max(first - start, 0), numel), min(max(last - start, 0), numel))
            for row, arm in enumerate(arms):
                sums[row, 0] += exact[own].square().sum()
                sums[row, 1] += (self.value(arm, index)[own] - exact[own]).square().sum()
        dist.all_reduce(sums)
        return dict(zip(arms, (10 * (sums[:, 0] / sums[:, 1]).log10()).tolist(), strict=True))


def milliseconds(run: Callable[[], None], device: torch.device) -> Callable[[], float]:
    """Run; returns what tells its time once the device is done."""
    if device.type == "cpu":
        begin = time.perf_counter()
        run()
        took = 1e3 * (time.perf_counter() - begin)
        return lambda: took
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return lambda: float(start.elapsed_time(end))


def timed(contestants: Contestants, arms: tuple[str, ...], device: torch.device) -> dict[str, list[float]]:
    """Times of each arm, interleaved; of every turn the slowest rank's."""
    together = torch.zeros(1, device=device)
    readings: dict[str, list[Callable[[], float]]] = {arm: [] for arm in arms}
    for turn in range(WARM_UP + TIMED):
        for arm in arms:
            contestants.restore(arm)
            dist.all_reduce(together)  # the ranks start together
            reading = milliseconds(lambda arm=arm: contestants.reduce(arm), device)
            if turn >= WARM_UP:
                readings[arm].append(reading)
    if device.type == "cuda":
        torch.cuda.synchronize()
    times = torch.tensor([[reading() for reading in readings[arm]] for arm in arms], device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return dict(zip(arms, times.tolist(), strict=True))


def working_arms(contestants: Contestants) -> tuple[str, ...]:
    """Reduce once by every arm; E4M3 sums need NCCL 2.24 and compute capability 9.0."""
    working = []
    for arm in ARMS:
        try:
            contestants.reduce(arm)
        except (RuntimeError, TypeError, ValueError) as refusal:
            if arm != ARMS[1]:
                raise
            if contestants.rank == 0:
                print(f"{arm} is not to be had here: {str(refusal).splitlines()[0]}")
        else:
            working.append(arm)
    return tuple(working)


def kernel_times(contestants: Contestants, device: torch.device) -> dict[str, tuple[float, int]]:
    """Median time in ms, and bytes touched, of quantising all gradients and of adding a shard, without a network."""
    from gnome.fp8.kernels.reduction import KernelReduction

    store, layout, ranks = contestants.stores["all to all"], contestants.layout, contestants.ranks
    first, last = layout.shard(contestants.rank)
    received = contestants.start["block"].view(ranks, -1)
    scales = contestants.scales["block"].view(ranks, -1)
    payload, scale = store.payload[first * BLOCK : last * BLOCK], store.scale[first:last]
    reduction = KernelReduction(layout, first, last, last - first, device)

    def quantise() -> None:
        store.clear()
        for index in range(N_TENSORS):
            store.add(index, layout.part(contestants.bf16, index))

    def add() -> None:
        reduction.mean(received, scales, 0, payload, scale)

    shard = (last - first) * BLOCK
    touched = {"quantise from BF16": 3 * layout.numel, "add and requantise": (ranks + 1) * shard}
    found = {}
    for name, run in (("quantise from BF16", quantise), ("add and requantise", add)):
        readings = [milliseconds(run, device) for _ in range(WARM_UP + TIMED)][WARM_UP:]
        torch.cuda.synchronize()
        found[name] = (statistics.median(reading() for reading in readings), touched[name])
    return found


def hardware(device: torch.device) -> dict[str, str]:
    """Where this was measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() if shutil.which("git") else ""
    found = {"torch": torch.__version__, "commit": commit, "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d")}
    if device.type == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return {
            "device": torch.cuda.get_device_name(),
            "nccl": nccl,
            "nvls": os.environ.get("NCCL_NVLS_ENABLE", "unset"),
            **found,
        }
    return {"device": f"{platform.machine()} CPU, gloo", **found}


def write_rows(rows: list[dict[str, object]]) -> None:
    """Append JSON rows to fp8_collectives.jsonl in the folder that $OUT names."""
    if folder := os.environ.get("OUT"):
        with (Path(folder) / "fp8_collectives.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def report(
    contestants: Contestants, times: dict[str, list[float]], snr: dict[str, float], options: Options
) -> list[dict[str, object]]:
    """Print one size's table; returns its rows."""
    rows: list[dict[str, object]] = []
    for arm, taken in times.items():
        quartiles = statistics.quantiles(taken, n=4)
        sent = contestants.sent(arm)
        row = {
            "size": contestants.layout.numel,
            "arm": arm,
            "ms": quartiles[1],
            "iqr_ms": quartiles[2] - quartiles[0],
            "MB_sent": sent / 1e6,
            "of_bf16_bytes": sent / contestants.sent(ARMS[0]),
            "of_bf16_time": quartiles[1] / statistics.median(times[ARMS[0]]),
            "bus_GB_per_s": sent / quartiles[1] / 1e6,
            "predicted_ms": (sent / options.link + contestants.touched(arm) / options.memory) / 1e6,
            "snr_dB": snr[arm],
        }
        rows.append(row)
        cells = [f"{value:12.3f}" for key, value in row.items() if isinstance(value, float)]
        print(f"{contestants.layout.numel / 2**20:8.2f}M  {arm:22}" + "".join(cells), flush=True)
    return rows


def run_rank(rank: int, options: Options) -> None:
    """Measure on one rank; rank 0 prints."""
    device = torch.device("cpu") if options.toy else torch.device("cuda", rank)
    if not options.toy:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    told = {} if options.toy else {"device_id": device}
    backend = "gloo" if options.toy else "nccl"
    dist.init_process_group(backend, f"file://{options.meeting}", rank=rank, world_size=options.ranks, **told)
    place = hardware(device)
    if rank == 0:
        print(", ".join(f"{key} {value}" for key, value in place.items()), f"\n{options.ranks} ranks; predicted from {options.link:g} GB/s "
              f"of link and {options.memory:g} GB/s of memory")  # fmt: skip
        heads = ("median ms", "IQR ms", "MB sent", "/BF16 bytes", "/BF16 time", "bus GB/s", "predicted", "SNR dB")
        print(f"{'numbers':>9}  {'arm':22}" + "".join(f"{head:>12}" for head in heads))
    for size in options.sizes:
        contestants = Contestants(rank, options.ranks, size, device)
        arms = working_arms(contestants)
        snr = contestants.accuracy(arms)
        times = timed(contestants, arms, device)
        if rank == 0:
            rows = report(contestants, times, snr, options)
            if use_kernels(device):
                for name, (taken, touched) in kernel_times(contestants, device).items():
                    print(f"           {name:22}{taken:12.3f} ms{touched / taken / 1e6:12.0f} GB/s of memory")
                    rows.append({"size": size, "arm": name, "ms": taken, "memory_GB_per_s": touched / taken / 1e6})
            write_rows([{"benchmark": "fp8_collectives", **place, "ranks": options.ranks, **row} for row in rows])
        dist.barrier()
        del contestants
    dist.destroy_process_group()


def simulated(ranks: int, spread: float, device: torch.device, numel: int) -> dict[str, float]:
    """SNR in dB of each scheme's arithmetic for a number of ranks, in one process."""
    values = [gradient(rank, 0, numel, device, spread) for rank in range(ranks)]
    exact = torch.stack(values).double().mean(0)
    layout = lay_out([numel])
    by_block, by_tensor = [], []
    for value in values:
        for stores, scaling in ((by_block, "block"), (by_tensor, "tensor")):
            stores.append(GradientStore(layout, device, scaling))
            stores[-1].add(0, value)

    def decibels(result: torch.Tensor) -> float:
        return 10 * float((exact.square().sum() / (result.double() - exact).square().sum()).log10())

    ring = values[0].bfloat16()
    for value in values[1:]:
        ring = ring + value.bfloat16()
    found = {"BF16 ring": decibels(ring.double() / ranks)}
    for name, mu in (("E4M3 ring, mu 1", 1.0), ("E4M3 ring, mu 1/sqrt N", ranks**-0.5)):
        found[name] = decibels(in_a_ring(by_tensor, layout, mu, device))
    shared = (
        torch.stack([store.scale for store in by_tensor]).amin(0) * ranks**-0.5
    )  # as MS-AMP: FP32 gradients, scale known before
    found["same, gradients rounded once"] = decibels(
        ring_sum([saturating_cast(value * shared, E4M3) for value in values]).float() / shared / ranks
    )
    received = torch.stack([store.payload.view(torch.uint8) for store in by_block]).view(by_block[0].payload.dtype)
    mean = torch.stack([store.value(0) for store in by_block]).mean(0)
    TorchReduction(layout, 0, layout.n_blocks, device).mean(
        received, torch.stack([store.scale for store in by_block]), 0, by_block[0].payload, by_block[0].scale
    )
    found["all to all"] = decibels(by_block[0].value(0))
    found["all to all, FP32 result"] = decibels(mean)
    return found


def in_a_ring(stores: list[GradientStore], layout: Layout, mu: float, device: torch.device) -> torch.Tensor:
    """Mean by FP8-LM's scheme: one scale for all ranks, E4M3 after every hop."""
    shared = torch.stack([store.scale for store in stores]).amin(0) * mu
    payloads = [store.payload.clone() for store in stores]
    for store, payload in zip(stores, payloads, strict=True):
        TorchReduction(layout, 0, layout.n_blocks, device).rescale(payload, shared / store.scale)
    return ring_sum(payloads).float() / shared / len(stores)


def simulate(numel: int) -> None:
    """Print what accuracy to expect with more ranks than this machine has GPUs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"\nSNR in dB by simulation in one process, no network ({numel / 2**20:g}M numbers; rows and columns spread by exp(s * normal))"
    )
    for spread in (0.0, 1.0):
        for ranks in (2, 4, 8):
            found = simulated(ranks, spread, device, numel)
            print(
                f"  s {spread:g}, {ranks} ranks: " + ", ".join(f"{name} {value:.1f}" for name, value in found.items()), flush=True
            )
            row = {
                "benchmark": "fp8_collectives",
                "simulated": True,
                "ranks": ranks,
                "spread": spread,
                "size": numel,
                "snr_dB": found,
            }
            write_rows([{**row, **hardware(device)}])


def count(text: str) -> int:
    """Read 4M as 4 * 2**20, and cut to what splits into the tensors of a test."""
    factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1].upper(), 1)
    numel = int(float(text[:-1] if factor > 1 else text) * factor)
    whole = numel - numel % (N_TENSORS * COLUMNS)
    if whole <= 0:
        raise argparse.ArgumentTypeError(f"{text} is too few: at least {N_TENSORS * COLUMNS} numbers are needed")
    return whole


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=count, help="numbers in a gradient, as 4M or 1G")
    parser.add_argument("--toy", action="store_true", help="small sizes on CPU processes over gloo")
    parser.add_argument("--ranks", type=int, default=2, help="CPU processes of --toy")
    parser.add_argument("--link", type=float, default=400.0, help="GB/s that a GPU sends")
    parser.add_argument("--memory", type=float, default=4300.0, help="GB/s of a GPU's memory")
    given = parser.parse_args()
    ranks = given.ranks if given.toy else torch.cuda.device_count()
    if ranks < 2:
        parser.error(f"needs 2 GPUs, there are {ranks}; --toy runs on CPU processes")
    sizes = given.sizes or [count(size) for size in (("64K", "1M") if given.toy else ("4M", "64M", "256M", "1G"))]
    with tempfile.TemporaryDirectory() as folder:
        options = Options(tuple(sizes), given.toy, ranks, given.link, given.memory, f"{folder}/meeting")
        mp.spawn(run_rank, args=(options,), nprocs=ranks)
    simulate(count("256K" if given.toy else "4M"))


if __name__ == "__main__":
    main()
