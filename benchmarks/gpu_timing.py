"""Time several ways to do the same work on a GPU, in turns, so that clocks and heat treat all of them alike."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of one arm, ms, and the largest memory it allocated while it ran, bytes."""

    median: float
    low: float
    high: float
    peak: int


def time_in_turns(
    arms: dict[str, Callable[[], Any]], *, warm_up: int = 10, samples: int = 30, inner: int = 1
) -> dict[str, Timing]:
    """Run A, B, C, A, B, C ...; each sample times `inner` runs in a row with device events and keeps their mean."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    peaks: dict[str, int] = {}
    for name, run in arms.items():
        for _ in range(warm_up):
            run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated()
    for _ in range(samples):
        for name, run in arms.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(inner):
                run()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop) / inner)
    return {
        name: Timing(statistics.median(own), *statistics.quantiles(own, n=4)[::2], peaks[name]) for name, own in times.items()
    }


def profile(run: Callable[[], None], name: str) -> None:
    """Print the kernels of one run, longest first."""
    run()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    ) as recorded:
        run()
        torch.cuda.synchronize()
    events = [e for e in recorded.key_averages() if e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in events)
    print(f"\n{name}: {total / 1e3:.2f} ms on the device")
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:22]:
        print(f"  {e.self_device_time_total / 1e3:8.3f} ms {e.count:5d}x  {e.key[:110]}")


def conditions() -> dict[str, Any]:
    """Hardware, software, commit and date of a run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit or os.environ.get("GNOME_COMMIT", "unknown"),
        "gpu": gpu,
        "torch": torch.__version__,
    }


def write_row(benchmark: str, **row: Any) -> None:
    """Append a result to $OUT/<benchmark>.jsonl, if OUT is set."""
    folder = os.environ.get("OUT")
    if folder:
        with (Path(folder) / f"{benchmark}.jsonl").open("a") as file:
            file.write(json.dumps({**conditions(), **row}) + "\n")


def print_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print a Markdown table."""
    cells = [header, *[tuple(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|", flush=True)
