"""CHGNet as an evaluator: the default, which works offline on any machine."""

from dataclasses import replace
from typing import Final

from dft_stub.potentials import CHGNetPotential
from dft_stub.references import shipped_references
from dft_stub.relaxer import RelaxSettings
from dft_stub.relaxing import RelaxingEvaluator
from dft_stub.workers import WorkerLimits
from gnome.processes import usable_cores
from gnome.stability.references import ElementalReferences

WORKERS_ON_GPU: Final = 4
"""Most processes that share a GPU: most of a relaxation's time its processor makes graphs, so a few keep the GPU busy, and each takes
half a GiB of its memory before it computes anything."""
GPU_OVERHEAD: Final = 4 * 2**30
"""Bytes of a worker's own memory that CUDA's libraries take."""


class CHGNetEvaluator(RelaxingEvaluator):
    """Relaxes with CHGNet 0.3.0 and takes formation energies from the shipped references (or those given).

    On a GPU (`device` as torch names it) at most `WORKERS_ON_GPU` processes work.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        settings: RelaxSettings | None = None,
        limits: WorkerLimits | None = None,
        references: ElementalReferences | None = None,
        device: str = "cpu",
    ) -> None:
        limits = limits or WorkerLimits()
        if not device.startswith("cpu"):
            workers = min(usable_cores() if workers is None else workers, WORKERS_ON_GPU)
            limits = replace(limits, memory_bytes=limits.memory_bytes + GPU_OVERHEAD, bounds_addresses=False)
        super().__init__(
            CHGNetPotential(device), references or shipped_references(), settings=settings, workers=workers, limits=limits
        )
