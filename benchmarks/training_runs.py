"""Train many networks at once: those of fixed shapes together in few processes on each GPU, the others one a process."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from gnome.models.training import EpochRecord, Run, fit_together

Row = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A run, its name in the log, and what makes a row of its trained network."""

    name: str
    run: Run
    row: Callable[[list[EpochRecord]], Row]


def train_jobs(
    prepare: Callable[[Any, str], Prepared], jobs: Sequence[Any], *, alone: Callable[[Any], bool], compiled: bool, processes: int
) -> Iterator[Row]:
    """Train all jobs on the GPUs there are, and yield a row of each as they end; `prepare(job, device)` is called where it runs.

    `processes`: how many on each GPU share the jobs that are not `alone`.
    """
    gpus = torch.cuda.device_count()
    devices = [f"cuda:{i}" for i in range(gpus)] or ["cpu"]
    together = [job for job in jobs if not alone(job)]
    count = min(processes * len(devices), len(together))
    groups = [together[i::count] for i in range(count)] + [[job] for job in jobs if alone(job)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(groups) if gpus else 1, mp_context=context) as pool:
        futures = [
            pool.submit(_train_group, prepare, group, devices[i % len(devices)], compiled) for i, group in enumerate(groups)
        ]
        for future in as_completed(futures):
            yield from future.result()


def _train_group(prepare: Callable[[Any, str], Prepared], jobs: Sequence[Any], device: str, compiled: bool) -> list[Row]:
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
    if device != "cpu":
        torch.set_num_threads(2)
        torch.cuda.set_device(device)
    prepared = [prepare(job, device) for job in jobs]
    began = time.perf_counter()

    def say(index: int, record: EpochRecord) -> None:
        if record.epoch in {1, 2} or record.epoch % 10 == 0:
            spent = time.perf_counter() - began
            errors = f"{record.train_mae:.4f} {record.validation_mae:.4f}"
            print(f"{prepared[index].name}: epoch {record.epoch}, {errors}, {spent:.0f} s", flush=True)

    histories = fit_together([one.run for one in prepared], on_epoch=say, compile_network=compiled)
    seconds = time.perf_counter() - began
    return [
        one.row(history) | {"seconds": seconds, "at once": len(jobs)} for one, history in zip(prepared, histories, strict=True)
    ]
