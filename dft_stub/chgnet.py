"""CHGNet as an evaluator: the default, which works offline on any machine."""

from dft_stub.potentials import CHGNetPotential
from dft_stub.references import shipped_references
from dft_stub.relaxer import RelaxSettings
from dft_stub.relaxing import RelaxingEvaluator
from dft_stub.workers import WorkerLimits
from gnome.stability.references import ElementalReferences


class CHGNetEvaluator(RelaxingEvaluator):
    """Relaxes with CHGNet 0.3.0 and takes formation energies from the shipped references (or those given)."""

    def __init__(
        self,
        *,
        workers: int | None = None,
        settings: RelaxSettings | None = None,
        limits: WorkerLimits | None = None,
        references: ElementalReferences | None = None,
    ) -> None:
        super().__init__(CHGNetPotential(), references or shipped_references(), settings=settings, workers=workers, limits=limits)
