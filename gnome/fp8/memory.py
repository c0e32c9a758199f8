"""Bytes that training keeps between steps, counted from the tensors themselves."""

from dataclasses import dataclass

from gnome.fp8.optimizer import AdamW
from gnome.fp8.registry import layer_of_weight


@dataclass(frozen=True)
class StateBytes:
    """Bytes of this rank: master weights, gradients, moments with all scales; and, apart, copies of weights that products use.

    `parameters` counts all parameters, sharded or not.
    """

    parameters: int
    master: int
    gradients: int
    moments: int
    working_copies: int

    @property
    def total(self) -> int:
        """Master, gradients and moments."""
        return self.master + self.gradients + self.moments

    @property
    def per_parameter(self) -> float:
        """Bytes a parameter, working copies left out."""
        return self.total / max(self.parameters, 1)

    def __str__(self) -> str:
        return (
            f"{self.per_parameter:.3f} bytes a parameter ({self.parameters:,} parameters; master {self.master:,}, gradients "
            f"{self.gradients:,}, moments {self.moments:,}); copies of the weights apart: {self.working_copies:,}"
        )


def state_bytes(optimizer: AdamW) -> StateBytes:
    """Count what the optimizer keeps."""
    exact = optimizer.exact
    layers = [layer_of_weight(p) for p, _ in optimizer.members]
    working = sum(layer.working.nbytes for layer in layers if layer is not None)
    published = sum(  # what this rank holds of weights beside its share's master
        arena.home.nbytes - (0 if arena.published_scale is not None else arena.weights.nbytes) for arena in optimizer.arenas
    )
    return StateBytes(
        parameters=sum(p.numel() for p, _ in optimizer.members),
        master=sum(arena.weights.nbytes + arena.weight_scale.nbytes for arena in optimizer.arenas) + exact.nbytes // 4,
        gradients=sum(store.nbytes for store in optimizer.stores) + exact.nbytes // 4,
        moments=sum(arena.state_bytes for arena in optimizer.arenas) + exact.nbytes // 2,
        working_copies=working + published,
    )
